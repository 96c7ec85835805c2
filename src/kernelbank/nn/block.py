"""The block of every backbone, a mixer and an MLP under timm's names, and the grid of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx
from timm.layers import DropPath, LayerScale, PatchEmbed, register_notrace_function, register_notrace_module
from torch import Tensor, nn

from kernelbank.nn.edit.carry import carry
from kernelbank.nn.layers import TokenBatchNorm
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.context import read_mask
from kernelbank.spec import MixerSpec, SpecError, TwoStep, Window
from kernelbank.spec.inventory import Grid

Norm = Callable[..., nn.Module]

for leaf in (Mixer, TokenBatchNorm):  # fx records each as one call, since tracing a mixer would fix its shapes
    register_notrace_module(leaf)


class TokenGrid:
    """The grid of N tokens: the patch embedding's own, or with `dynamic` that of the last image with N patches.

    Tokens (B, T, C) do not show whether they are 4 x 6 or 6 x 4, and timm's trunk passes nothing else to its blocks. A
    backward that runs blocks again (gradient checkpointing) could use the wrong one of the two and is an error.
    """

    def __init__(self, patch_embed: PatchEmbed, dynamic: bool) -> None:
        self.patch_embed = patch_embed
        self.seen: dict[int, list[Grid]] = {}
        self.exported: Grid | None = None  # symbols, if sizes are dynamic: those are no keys of a dict
        if dynamic:
            patch_embed.register_forward_hook(self._note)

    def _note(self, patch_embed: nn.Module, images: tuple[Tensor], tokens: Tensor) -> None:
        rows, columns = images[0].shape[-2:]
        height, width = self.patch_embed.dynamic_feat_size((rows, columns))
        if torch.compiler.is_exporting():
            self.exported = height, width
            return
        grids = self.seen.setdefault(height * width, [])
        if (height, width) in grids:
            grids.remove((height, width))
        grids.append((height, width))

    def __call__(self, count: int) -> Grid:
        """Return (H, W) of `count` tokens, the prefix not counted. Raises SpecError in a backward if images of several
        shapes had as many."""
        if torch.compiler.is_exporting() and self.exported is not None:
            return self.exported
        if count not in self.seen:
            height, width = self.patch_embed.grid_size
            return height, width
        grids = self.seen[count]
        if len(grids) > 1 and _in_backward():
            raise SpecError(f"invalid gradient checkpointing: {count} tokens were {grids} in images of several shapes; "
                            "expected one shape per number of tokens, or no checkpointing")  # fmt: skip
        return grids[-1]


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class StageSpecs:
    """The specs of a stage: its mixer, with the shift of windows unresolved, and its MLP or None."""

    mixer: MixerSpec
    mlp: MixerSpec | None

    def at_block(self, index: int) -> tuple[MixerSpec, MixerSpec | None]:
        """Return the specs of block `index` of the stage, with the shift of its windows resolved."""
        return self.mixer.at_block(index), None if self.mlp is None else self.mlp.at_block(index)

    def with_window(self, window: Sequence[int]) -> StageSpecs:
        """Return the specs with windows of (height, width), if the mixer has windows. Raises SpecError unless they are
        square, and for a shift that does not fit."""
        support = self.mixer.support
        if not isinstance(support, Window):
            return self
        return replace(self, mixer=replace(self.mixer, support=replace(support, M=square(window))))


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """The arguments of a block besides its specs: `init_values` (LayerScale), the drop rates, `dynamic`
    sizes and `norm_layer` are timm's."""

    dim: int
    num_heads: int
    grid: Grid
    prefix: int = 0
    init_values: float | None = None
    proj_drop: float = 0.0
    attn_drop: float = 0.0
    drop_path: float = 0.0
    dynamic: bool = False
    norm_layer: Norm = nn.LayerNorm
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


class Block(nn.Module):
    """x + DropPath(LayerScale(attn(norm1(x)))), then x + DropPath(LayerScale(mlp(norm2(x)))) unless there is no MLP.

    `attn` and `mlp` are Mixers. All names are timm's. `specs` are those of the stage and `index` is the position in it,
    which resolves an alternating shift. With a bn_relu mixer there is no norm before the mixer and a BatchNorm before
    the MLP (DWNet).
    """

    def __init__(self, specs: StageSpecs, index: int, options: BlockOptions) -> None:
        super().__init__()
        self.specs, self.index = specs, index
        mixer, mlp = specs.at_block(index)
        dd = {"device": options.device, "dtype": options.dtype}
        normed_inside = mixer.frame == "bn_relu"
        self.norm1 = nn.Identity() if normed_inside else options.norm_layer(options.dim, **dd)
        self.attn = _mixer(mixer, options, attn_drop=options.attn_drop)
        self.ls1, self.drop_path1 = _branch(options)
        self.norm2: nn.Module | None = None
        self.mlp: Mixer | None = None
        if mlp is not None:
            norm: Norm = TokenBatchNorm if normed_inside else options.norm_layer
            self.norm2 = norm(options.dim, **dd)
            # timm's Mlp also drops after its activation, which is the attention map of this spec
            self.mlp = _mixer(mlp, options, attn_drop=options.proj_drop if isinstance(mlp.kernel, TwoStep) else 0.0)
            self.ls2, self.drop_path2 = _branch(options)

    def run(self, x: Tensor, grid: Grid, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, T, C) on `grid` -> (B, T, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), grid, attn_mask)))
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x), grid)))

    def replace_mixer(self, spec: MixerSpec, mixer: Mixer) -> None:
        """Replace the mixer; `spec` is that of the stage, an alternating shift unresolved."""
        self.specs, self.attn = replace(self.specs, mixer=spec), mixer

    def set_grid(self, grid: Grid) -> None:
        """Move to another grid, and to `specs` where they have changed: tables and projections are resampled and
        rescaled (see `carry`)."""
        mixer, mlp = self.specs.at_block(self.index)
        self.attn = _moved(self.attn, mixer, grid)
        if self.mlp is not None and mlp is not None:
            self.mlp = _moved(self.mlp, mlp, grid)


class PlainBlock(Block):
    """A block on tokens (B, T, C), prefix first (ViT)."""

    def __init__(self, specs: StageSpecs, index: int, options: BlockOptions, token_grid: TokenGrid) -> None:
        super().__init__(specs, index, options)
        self.token_grid = token_grid

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (B, T, C) -> (B, T, C). `attn_mask` as in `Mixer`; `is_causal` hides later tokens."""
        return self.run(x, grid_of(self, x), narrowed(x, attn_mask, is_causal))


# Leaves of torch.fx, since values that depend on the shape of the tokens must not be traced.
torch.fx.wrap("grid_of")
torch.fx.wrap("narrowed")


@register_notrace_function
def grid_of(block: PlainBlock, x: Tensor) -> Grid:
    """The grid of the tokens x (B, T, C) of a block."""
    return block.token_grid(x.shape[1] - block.attn.prefix)


class StageBlock(Block):
    """A block on a map (B, H, W, C) (Swin)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        return self.run(x.reshape(B, H * W, C), (H, W)).reshape(B, H, W, C)

    def set_input_size(self, feat_size: Grid, window_size: Grid, always_partition: bool | None = None) -> None:
        """Set the grid, as timm's stages do. The side of windows stays that of the spec."""
        self.set_grid((feat_size[0], feat_size[1]))


def _moved(mixer: Mixer, spec: MixerSpec, grid: Grid) -> Mixer:
    """Move `mixer` to another grid in place, hooks included, or return a new one for another spec."""
    if spec != mixer.spec:
        return carry(mixer, spec, grid)[0]
    mixer.set_grid(grid)
    return mixer


def square(window: Sequence[int]) -> int:
    """The side of a window (height, width). Raises SpecError unless it is square."""
    if window[0] != window[1]:
        raise SpecError(f"invalid window_size={tuple(window)}; expected square windows")
    return window[0]


@register_notrace_function
def narrowed(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """`attn_mask`, and with `is_causal` what it leaves of the mask under which token i sees tokens up to i. Raises
    SpecError for masks of another shape, dtype or value than `ops.context.read_mask` takes."""
    if not is_causal:
        return attn_mask
    tokens = x.shape[1]
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()[None]
    return earlier if attn_mask is None else earlier & read_mask(attn_mask, x)


def _mixer(spec: MixerSpec, options: BlockOptions, attn_drop: float) -> Mixer:
    return Mixer(
        spec, options.dim, options.num_heads, options.grid, prefix=options.prefix, attn_drop=attn_drop,
        proj_drop=options.proj_drop, dynamic_grid=options.dynamic, device=options.device, dtype=options.dtype,
    )  # fmt: skip


def _branch(options: BlockOptions) -> tuple[nn.Module, nn.Module]:
    """LayerScale and drop path of one branch; Identity where there is none, so that state dicts are timm's."""
    scale = (
        LayerScale(options.dim, options.init_values, device=options.device, dtype=options.dtype)
        if options.init_values
        else None
    )
    return scale or nn.Identity(), DropPath(options.drop_path) if options.drop_path else nn.Identity()
