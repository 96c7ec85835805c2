"""The studies by name."""

from __future__ import annotations

from collections.abc import Callable

from kernelbank.studies.assumptions import assumptions
from kernelbank.studies.depthwise import depthwise
from kernelbank.studies.future import future
from kernelbank.studies.kernels import kernels
from kernelbank.studies.softmax import softmax
from kernelbank.studies.study import Study
from kernelbank.studies.swap import swap

STUDIES: dict[str, Callable[[], Study]] = {
    "softmax": softmax,
    "depthwise": depthwise,
    "assumptions": assumptions,
    "kernels": kernels,
    "future": future,
    "swap": swap,
}
