"""Read the tensors of a pickle without running code from it.

torch reads tensors and plain containers (``weights_only``). Training checkpoints also hold the arguments of the run, as
an argparse.Namespace, paths, or numbers of NumPy. The names in `SETTINGS` are read as `Setting`, which keeps nothing;
every other name in a pickle is an error.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from kernelbank.errors import InputError
from kernelbank.text import one_line


class Setting:
    """An object of a training script in place of which nothing is built: it ignores its arguments and its state."""

    def __new__(cls, *arguments: object, **options: object) -> Setting:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class SettingMapping(dict[Any, Any]):
    """A dictionary of settings: its items are read, and its attributes are ignored."""

    def __setstate__(self, state: object) -> None:
        pass


SETTINGS = (
    "argparse.Namespace", "types.SimpleNamespace", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "numpy.dtype", "numpy.ndarray",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct", "_codecs.encode", "datetime.timedelta", "datetime.datetime",
)  # fmt: skip
"""The names that are read as `Setting`: the arguments of a run and the states of random generators."""
SETTING_MAPPINGS = (
    "yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict", "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict", "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict", "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
)  # fmt: skip
"""The names that are read as `SettingMapping`: configurations of Swin, mmpretrain and Lightning."""
_INERT: list[Any] = [(Setting, name) for name in SETTINGS] + [(SettingMapping, name) for name in SETTING_MAPPINGS]


def read_pickle(path: Path) -> Any:
    """Return what a pickle of torch holds, on the CPU, with a `Setting` for every object of `SETTINGS`.

    Raises:
        InputError: If the file is truncated or corrupted, or names anything else. No code in it is run.
    """
    with path.open("rb"):  # what cannot be opened is an OSError with its reason
        pass
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_INERT):
            warnings.simplefilter("ignore")  # on pickles that torch did not write; they are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything: struct.error, RuntimeError, KeyError, ...
        code = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if code:
        raise InputError(f"{path}: holds {one_line(code[1])}, not only weights; it is not read, as that could run "
                         "code: save its state dict alone")  # fmt: skip
    raise InputError(f"{path}: truncated or corrupted, or not a checkpoint of torch")
