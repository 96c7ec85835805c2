"""Mixers in the place of timm's token mixers: each takes the arguments of the module that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.fx
from timm.layers import register_notrace_module
from torch import Tensor

from kernelbank.nn.block import narrowed
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid

Inputs = tuple[Tensor, Grid, Tensor | None]
"""What a mixer takes in: tokens (B, T, C), their grid and a mask."""


class SeatedMixer(Mixer):
    """A mixer in the place of a token mixer of timm's.

    `stage_spec` is the spec before its shift is resolved for the block.
    """

    stage_spec: MixerSpec

    def inputs(self, *args: Any, **kwargs: Any) -> Inputs:
        """The tokens (B, T, C) in the order of the grid, the grid and the mask, from the arguments of `forward`."""
        raise NotImplementedError


class AttentionMixer(SeatedMixer):
    """A mixer in the place of an attention on tokens (B, T, C). It takes timm's masks and looks up the grid of the
    tokens."""

    token_grid: Callable[[int], Grid]

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). Raises SpecError for masks that the spec cannot honour."""
        return _attended(self.fx_argument(x), x, attn_mask, is_causal)

    def inputs(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Inputs:
        return x, self.token_grid(x.shape[1] - self.prefix), narrowed(x, attn_mask, is_causal)


class RotaryMixer(AttentionMixer):
    """A mixer in the place of timm's AttentionRope and EvaAttention. The rotation is that of its spec, not `rope`."""

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). Raises SpecError for masks that the spec cannot honour."""
        return _attended(self.fx_argument(x), x, attn_mask, is_causal)

    def inputs(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Inputs:
        return super().inputs(x, attn_mask, is_causal)


class RelativeMixer(AttentionMixer):
    """A mixer in the place of the attention of BEiT and of `vit_relpos`. A bias that the blocks of the model share is
    in its own table, so that the arguments for it are not used."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, shared_rel_pos: Tensor | None = None
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        return _attended(self.fx_argument(x), x, None, False)

    def inputs(self, x: Tensor, **biases: Tensor | None) -> Inputs:  # type: ignore[override]
        return super().inputs(x)


class MapMixer(SeatedMixer):
    """A mixer in the place of a module on maps (B, C, H, W)."""

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (B, C, H, W) -> (B, C, H, W). A relative bias is that of the mixer's own table."""
        return _on_map(self.fx_argument(x), x)

    def inputs(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Inputs:
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]), None


for leaf in (AttentionMixer, RotaryMixer, RelativeMixer, MapMixer):
    register_notrace_module(leaf)
torch.fx.wrap("_attended")
torch.fx.wrap("_on_map")

S = TypeVar("S", bound=SeatedMixer)


def _attended(mixer: Any, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """`AttentionMixer.forward`: one leaf for torch.fx, as that of `Mixer`."""
    return Mixer.forward(mixer, *AttentionMixer.inputs(mixer, x, attn_mask, is_causal))


def _on_map(mixer: Any, x: Tensor) -> Tensor:
    """`MapMixer.forward`, one leaf."""
    tokens, grid, mask = mixer.inputs(x)
    return Mixer.forward(mixer, tokens, grid, mask).transpose(1, 2).unflatten(2, grid)


Place = Callable[[MixerSpec, Mixer], None]
"""Puts a mixer, and the spec of its stage, into a block."""


def placer(owner: Any, leaf: str) -> Place:
    """What puts a mixer into `owner` under the name `leaf`."""

    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        assert isinstance(mixer, SeatedMixer)
        mixer.stage_spec = stage_spec
        setattr(owner, leaf, mixer)

    return place


def adopting_placer(owner: Any, leaf: str) -> Place:
    """As `placer`, in the place of a module without parameters: the mixer gets device and dtype of the others."""
    put = placer(owner, leaf)

    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        like = next(parameter for parameter in owner.parameters())
        put(stage_spec, mixer.to(like.device, like.dtype))

    return place


def token_placer(owner: Any, leaf: str, token_grid: Callable[[], Callable[[int], Grid]]) -> Place:
    """As `placer`, for a mixer that looks up the grid of its tokens."""
    put = placer(owner, leaf)

    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        assert isinstance(mixer, AttentionMixer)
        mixer.token_grid = token_grid()
        put(stage_spec, mixer)

    return place
