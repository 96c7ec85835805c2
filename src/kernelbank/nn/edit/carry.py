"""Carry the weights of a mixer over to another spec or grid.

Every tensor of both mixers is accounted for: it is kept, transformed (see `transform`), dropped from the old mixer, or
initialised in the new one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from kernelbank.nn.linears import is_plain
from kernelbank.nn.mixer import Mixer, initialise_tensor
from kernelbank.nn.transform import Placement, move, side
from kernelbank.spec import MixerSpec, SpecError
from kernelbank.spec.inventory import Grid
from kernelbank.spec.inventory import Tensor as Entry

M = TypeVar("M", bound=Mixer)
CarryVerdict = Literal["kept", "transformed", "dropped", "initialised"]


@dataclass(frozen=True)
class Carried:
    """The outcome for one tensor; `how` states how it was transformed or why it was dropped."""

    name: str
    verdict: CarryVerdict
    how: str = ""


def carry(mixer: M, spec: MixerSpec | None = None, grid: Grid | None = None) -> tuple[M, tuple[Carried, ...]]:
    """Return `mixer` with another spec or on another grid, and the outcome for each tensor.

    Parameters that are kept are the same objects.

    Raises:
        SpecError: If the channels, heads or prefix do not fit the spec or grid, if the new spec has no attention map to
            drop from, or if a layer is adapted, hooked, parametrised or pruned, which the new mixer would not be.
    """
    spec, grid = spec or mixer.spec, grid or mixer.grid
    carried = type(mixer)(
        spec, mixer.dim, mixer.num_heads, grid, prefix=mixer.prefix,
        attn_drop=mixer.attn_drop, proj_drop=mixer.proj_drop, dynamic_grid=mixer.dynamic_grid, device="meta",
    )  # fmt: skip
    for name in mixer.linears:
        if not is_plain(module := mixer.get_submodule(name)):
            raise SpecError(f"invalid {name}, an adapted, hooked or parametrised {type(module).__name__}; expected a "
                            "plain nn.Linear (merge or remove what was added)")  # fmt: skip
    old = mixer.tensors()
    for entry in mixer.entries:
        if not (entry.buffer or isinstance(old[entry.name], nn.Parameter)):
            raise SpecError(f"invalid {entry.name}, which is parametrised or pruned; expected a plain parameter")
    before, after = Placement(mixer.spec, mixer.grid, mixer.prefix), Placement(spec, grid, mixer.prefix)
    tensors: dict[str, Tensor] = {}
    log: list[Carried] = []
    for entry in carried.entries:
        source = old.get(entry.name)
        with torch.no_grad():
            moved = None if source is None else move(source, entry, before, after)
        if source is None or moved is None:
            like = next(iter(old.values()), None)
            tensors[entry.name] = _fresh(entry, like)
            if source is not None:
                log.append(Carried(entry.name, "dropped", f"{side(source.shape)} does not become {side(entry.shape)}"))
            log.append(Carried(entry.name, "initialised"))
            continue
        tensor, how = moved
        tensors[entry.name] = nn.Parameter(tensor, source.requires_grad) if how and not entry.buffer else tensor
        log.append(Carried(entry.name, "transformed" if how else "kept", how))
    log += [Carried(name, "dropped", f"{spec} has none") for name in old if name not in tensors]
    carried.assign(tensors)
    carried.temperature = mixer.temperature
    return carried.train(mixer.training), tuple(log)


def _fresh(entry: Entry, like: Tensor | None) -> Tensor:
    tensor = torch.empty(entry.shape) if like is None else like.new_empty(entry.shape)
    with torch.no_grad():
        initialise_tensor(tensor, entry)
    return tensor
