"""Data sets by name or path. Imports no torch until one is opened."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kernelbank.errors import InputError
from kernelbank.text import suggest

if TYPE_CHECKING:
    from kernelbank.data.archive import Progress
    from kernelbank.data.dataset import Dataset
    from kernelbank.data.images import Loading

NAMED_DATA: dict[str, str] = {"digits": "kernelbank.data.digits:digits"}
"""Data sets in memory: name -> module:function that returns it."""
SOURCES: dict[str, str] = {
    "cifar10": "kernelbank.data.cifar10:open_cifar10",
    "torch": "kernelbank.data.sources:open_torchvision",
    "hfds": "kernelbank.data.sources:open_hugging_face",
    "wds": "kernelbank.data.shards:open_shards",
}
"""Data sets and libraries of them: the prefix before the first slash -> module:function of `open_path`'s signature.
Anything else is a path."""
SHOWN = ("cifar10[/PATH]", "torch/NAME", "hfds/NAME", "wds/PATH")
"""How the names of `SOURCES` are written."""
_PATH = "kernelbank.data.sources:open_path"


def check_name(name: str) -> None:
    """Raise InputError unless there is a data set in memory of this name."""
    if name not in NAMED_DATA:
        known = ", ".join(NAMED_DATA)
        raise InputError(f"data: unknown data set {name!r}{suggest(name, NAMED_DATA)}; expected one of {known}")


def load(name: str) -> Dataset:
    """The data set in memory `name`. Raises InputError if there is none of this name."""
    check_name(name)
    return cast("Dataset", _function(NAMED_DATA[name])())


def open_data(
    text: str, loading: Loading, *, cache: Path, download: bool = False, progress: Progress | None = None
) -> Dataset:
    """The data set named by `text`: a name in memory (digits), a folder or an archive of train/CLASS/IMAGE, val and
    test likewise, ``cifar10`` and ``cifar10/PATH``, ``torch/NAME`` (torchvision), ``hfds/NAME`` (Hugging Face) or
    ``wds/PATH`` (WebDataset shards).

    An archive is unpacked once below `cache`. A tenth of every training class, by hash of the file name, becomes the
    validation split where there is none. Raises InputError.
    """
    if text in NAMED_DATA:
        return load(text)
    opener = _function(SOURCES.get(text.partition("/")[0], _PATH))
    return cast("Dataset", opener(text, loading, cache=cache, download=download, progress=progress))


def _function(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return cast("Callable[..., Any]", getattr(import_module(module), function))
