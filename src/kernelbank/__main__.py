"""``python -m kernelbank``."""

import sys

from kernelbank.cli import main

sys.exit(main())
