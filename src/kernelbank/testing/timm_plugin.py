"""A pytest plugin that points timm's own, unmodified ``tests/test_models.py`` at our models.

``pytest -p kernelbank.testing.timm_plugin test_models.py``: the file asks timm which models there are, by name, and
for some tests by the module they come from; here it is told ours. ``KERNELBANK_MODELS`` is a comma-separated list of
name patterns, all by default. Nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import timm

import kernelbank.models

CHOSEN = os.environ.get("KERNELBANK_MODELS", "*").split(",")
OURS = [name for name in kernelbank.models.__all__ if any(fnmatch(name, pattern) for pattern in CHOSEN)]
_MODULE = kernelbank.models.__name__.rpartition(".")[2]
_list_models = timm.list_models


def list_models(filter: str | Sequence[str] = "", module: str | Sequence[str] = "", **options: Any) -> list[str]:
    """timm.list_models of our models alone; a list of modules is taken to hold ours."""
    asked = [module] if isinstance(module, str) else list(module)
    found = _list_models(filter, module=[*asked, _MODULE] if any(asked) else "", **options)
    return [name for name in found if name.partition(".")[0] in OURS]


timm.list_models = list_models
timm.list_pretrained = lambda *_, **__: []
