"""Open data sets by name or path. Imports no torch until one is opened."""

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
"""Data sets in memory, from the name to the module:function that returns it."""
SOURCES: dict[str, str] = {
    "torch": "kernelbank.data.sources:open_torchvision",
    "hfds": "kernelbank.data.sources:open_hugging_face",
    "wds": "kernelbank.data.shards:open_shards",
}
"""Data sets of libraries, from the prefix before the first slash to the module:function of `Request`. Any other text is
a path."""
PREFIXES = tuple(SOURCES)
_PATH = "kernelbank.data.sources:open_path"


def check_name(name: str) -> None:
    """Raise InputError unless `name` is a data set in memory."""
    if name not in NAMED_DATA:
        known = ", ".join(NAMED_DATA)
        raise InputError(f"data: unknown data set {name!r}{suggest(name, NAMED_DATA)}; expected one of {known}")


def load(name: str) -> Dataset:
    """Return the data set in memory `name`. Raises InputError if there is none of this name."""
    check_name(name)
    return cast("Dataset", _function(NAMED_DATA[name])())


def open_data(
    text: str, loading: Loading, *, cache: Path, download: bool = False, progress: Progress | None = None
) -> Dataset:
    """Return the data set `text`: the name of one in memory (digits), a folder or an archive with train/CLASS/IMAGE,
    and val and test in the same layout, ``torch/NAME`` (torchvision), ``hfds/NAME`` (Hugging Face) or ``wds/PATH``
    (WebDataset shards).

    An archive is unpacked once below `cache`. If there is no validation split, a tenth of every training class, chosen
    by the hash of the file names, is held out.

    Raises:
        InputError: If the data set does not exist or cannot be read.
    """
    if text in NAMED_DATA:
        return load(text)
    opener = _function(SOURCES.get(text.partition("/")[0], _PATH))
    return cast("Dataset", opener(text, loading, cache=cache, download=download, progress=progress))


def _function(target: str) -> Callable[..., Any]:
    module, _, function = target.partition(":")
    return cast("Callable[..., Any]", getattr(import_module(module), function))
