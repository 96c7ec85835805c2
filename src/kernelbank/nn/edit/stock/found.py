"""What an adapter finds in a model: the attention of a block as a mixer, and where to put another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from kernelbank.errors import InputError
from kernelbank.nn.block import Block
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec


@dataclass(frozen=True)
class BlockAttention:
    """The token mixer of one block of a model.

    Attributes:
        name: The name of the token mixer in the model: ``blocks.0.attn``.
        stage: The stage of the block.
        index: The position of the block in its stage.
        spec: The spec of the stage, an alternating shift unresolved.
        mixer: A mixer that computes the same.
        place: Puts another mixer, and the spec of its stage, into the block.
        lacking: The tensors of the mixer that the model does not have. They are zero.
    """

    name: str
    stage: int
    index: int
    spec: MixerSpec
    mixer: Mixer
    place: Callable[[MixerSpec, Mixer], None]
    lacking: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LeftAttention:
    """A token mixer that stays as it is, since no spec describes it, in a model whose other blocks are replaced."""

    name: str
    reason: str


Found = Iterator[BlockAttention | LeftAttention]
Adapter = Callable[[Any], Found]
"""Yields the token mixers of a model. Raises InputError, naming the module, for one that no spec describes."""


def own_block(block: Block, name: str, stage: int, index: int) -> BlockAttention:
    """The mixer of one of our own blocks."""

    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        block.replace_mixer(stage_spec, mixer)

    return BlockAttention(f"{name}.attn", stage, index, block.specs.mixer, block.attn, place)


def check_own(attentions: list[nn.Module]) -> None:
    """Raise InputError if two blocks share their attention, since two mixers would not."""
    if len({id(attention) for attention in attentions}) < len(attentions):
        raise InputError("invalid attn, which several blocks share; expected one per block")
