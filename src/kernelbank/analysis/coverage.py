"""How many of timm's pretrained models have token mixers that a spec describes, counted on the meta device."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module

import timm
import torch
from rich.console import Console
from rich.progress import track
from timm.models import get_arch_name, list_models
from timm.models._registry import _model_to_module

from kernelbank.errors import InputError
from kernelbank.nn.edit.stock import ADAPTERS, block_attentions, left_attentions
from kernelbank.text import columns, one_line


@dataclass(frozen=True)
class ModelCoverage:
    """One architecture of timm.

    Attributes:
        name: The name of the architecture.
        kind: The class of the model.
        tags: The number of pretrained weights that it has.
        taken: The number of blocks whose token mixer a spec describes.
        left: The number of token mixers that stay as they are.
        reason: Why the model is refused; empty if it is not.
    """

    name: str
    kind: str
    tags: int
    taken: int
    left: int
    reason: str = ""


def coverage() -> Iterator[ModelCoverage]:
    """Yield the coverage of every pretrained architecture whose class has an adapter."""
    tags = Counter(get_arch_name(tag) for tag in list_models(pretrained=True))
    for name in candidates(tags):
        yield cover(name, tags[name])


def candidates(tags: Mapping[str, int]) -> list[str]:
    """The architectures in modules of timm that have a class with an adapter."""
    modules = {name: import_module(f"timm.models.{_model_to_module[name]}") for name in tags}
    return [name for name, module in modules.items() if any(hasattr(module, kind) for kind in ADAPTERS)]


def cover(name: str, tags: int) -> ModelCoverage:
    """The coverage of one architecture."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = timm.create_model(name)
    kind = type(model).__name__
    try:
        taken, left = list(block_attentions(model)), list(left_attentions(model))
    except InputError as error:
        return ModelCoverage(name, kind, tags, 0, 0, one_line(error))
    reason = "" if taken else f"no token mixer that a spec describes ({left[0].reason})" if left else "no token mixer"
    return ModelCoverage(name, kind, tags, len(taken), len(left), reason)


def show_coverage(as_json: bool) -> int:
    """Print the table by class, or JSON, and return 0. Progress goes to the error output."""
    every = Counter(get_arch_name(tag) for tag in list_models(pretrained=True))
    names = candidates(every)
    shown = track(names, "models", console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True)
    found = [cover(name, every[name]) for name in shown]
    if as_json:
        document = {"timm": timm.__version__, "tags": every.total(), "models": [asdict(one) for one in found]}
        print(json.dumps(document, indent=1))
    else:
        print(table(found, every.total()))
    return 0


def table(found: list[ModelCoverage], total: int) -> str:
    """Tags by class: all, those taken with every token mixer, those taken in part, and the reasons of the others."""
    rows = [("class", "tags", "taken", "in part", "refused")]
    for kind in sorted({one.kind for one in found}, key=lambda kind: -_tags(found, kind)):
        members = [one for one in found if one.kind == kind]
        refused = Counter[str]()
        for one in members:
            refused.update({one.reason: one.tags} if one.reason else {})
        whole = sum(one.tags for one in members if one.taken and not one.left)
        part = sum(one.tags for one in members if one.taken and one.left)
        texts = [f"{count}: {reason}" for reason, count in refused.items()]
        numbers = (str(_tags(found, kind)), str(whole), str(part))
        rows += [(kind, *numbers, texts[0] if texts else ""), *(("", "", "", "", text) for text in texts[1:])]
    taken = sum(one.tags for one in found if one.taken)
    others = total - sum(one.tags for one in found)
    return "\n".join([
        columns(rows),
        f"taken: {taken} of {total} pretrained tags of timm {timm.__version__}; {others} are of classes without an "
        "adapter",
    ])  # fmt: skip


def _tags(found: list[ModelCoverage], kind: str) -> int:
    return sum(one.tags for one in found if one.kind == kind)
