"""A pytest plugin that runs timm's unmodified ``tests/test_models.py`` on the models of this library.

Usage: ``pytest -p kernelbank.testing.timm_plugin test_models.py``.

Importing this module patches timm: `timm.list_models` then lists the models of this library alone, and
`timm.list_pretrained` lists none, so that nothing is downloaded. The environment variable ``KERNELBANK_MODELS`` is a
comma-separated list of name patterns, by default of all models.
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
    """`timm.list_models`, of the models of this library alone. A list of modules is extended by theirs."""
    modules = [module] if isinstance(module, str) else list(module)
    names = _list_models(filter, module=[*modules, _MODULE] if any(modules) else "", **options)
    return [name for name in names if name.partition(".")[0] in OURS]


timm.list_models = list_models
timm.list_pretrained = lambda *_, **__: []
