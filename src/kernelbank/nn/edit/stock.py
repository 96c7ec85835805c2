"""Read the attention of timm's stock models as mixers with the same weights, and put other mixers in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch.fx
from timm.layers import Attention, PatchEmbed, register_notrace_module
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.block import Block, TokenGrid, narrowed, square
from kernelbank.nn.edit.carry import M, carry
from kernelbank.nn.mixer import Mixer
from kernelbank.nn.state import translate
from kernelbank.nn.timm_names import ATTENTION, OUR_TABLE, TABLE
from kernelbank.ops.frame import HEAD_EPS
from kernelbank.spec import MixerSpec, Window
from kernelbank.spec.inventory import Grid

PLAIN, STAGE = MixerSpec.parse("vit"), MixerSpec.parse("swin")


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block of a model.

    Attributes:
        name: The block's name in the model.
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


class AttentionMixer(Mixer):
    """A mixer in place of timm's Attention. It takes tokens and timm's masks and looks up the grid of the tokens.

    `stage_spec` is the spec before its shift is resolved for the block.
    """

    token_grid: TokenGrid
    stage_spec: MixerSpec

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C). Raises SpecError for masks that the spec cannot honour."""
        return _attended(self.fx_argument(x), x, attn_mask, is_causal)


register_notrace_module(AttentionMixer)
torch.fx.wrap("_attended")


def _attended(mixer: AttentionMixer, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """`AttentionMixer.forward`: one leaf for torch.fx, as that of `Mixer`."""
    return Mixer.forward(mixer, x, mixer.token_grid(x.shape[1] - mixer.prefix), narrowed(x, attn_mask, is_causal))


class SwinMixerBlock(nn.Module):
    """timm's SwinTransformerBlock with a mixer as `attn`. The mixer takes the whole map, so the block neither rolls nor
    partitions it. The other parts are those of the stock block, under the same names."""

    norm1: nn.Module
    attn: Mixer
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, mixer: Mixer, stage_spec: MixerSpec, index: int) -> None:
        super().__init__()
        self.stage_spec, self.index = stage_spec, index
        for name, part in block.named_children():
            self.add_module(name, mixer if name == "attn" else part)
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        x = x.reshape(B, H * W, C)
        x = x + self.drop_path1(self.attn(self.norm1(x), (H, W)))
        x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(B, H, W, C)

    def set_input_size(self, feat_size: Grid, window_size: Grid, always_partition: bool | None = None) -> None:
        """Set the grid and the window size, as timm's stages do. Raises SpecError for windows that are not square."""
        support = self.stage_spec.support
        if isinstance(support, Window):
            self.stage_spec = replace(self.stage_spec, support=replace(support, M=square(window_size)))
        spec, grid = self.stage_spec.at_block(self.index), (feat_size[0], feat_size[1])
        if spec == self.attn.spec:
            self.attn.set_grid(grid)
        else:
            self.attn = carry(self.attn, spec, grid)[0]


def block_attentions(model: nn.Module) -> Iterator[BlockAttention]:
    """Yield the attention of every block without changing the model. Raises InputError, naming the module, for a model
    or an attention that no spec describes."""
    if isinstance(model, VisionTransformer):
        yield from _vit_attentions(model)
    elif isinstance(model, SwinTransformer):
        yield from _swin_attentions(model)
    else:
        raise InputError(f"model: invalid class {type(model).__name__}; expected timm's VisionTransformer or "
                         "SwinTransformer, or a KernelBank backbone")  # fmt: skip


def _vit_attentions(model: VisionTransformer) -> Iterator[BlockAttention]:
    embed = cast(PatchEmbed, model.patch_embed)
    if isinstance(model.patch_drop, nn.Module) and not isinstance(model.patch_drop, nn.Identity):
        raise InputError("invalid patch_drop_rate: dropped patches have no place on the grid; expected 0")
    token_grid = cache(lambda: TokenGrid(embed, bool(model.dynamic_img_size)))
    _check_own([block.attn for block in model.blocks if hasattr(block, "attn")])
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        if isinstance(block, Block):
            yield _read_own_block(block, name, 0, index)
            continue
        attention = getattr(block, "attn", None)
        if isinstance(attention, AttentionMixer):
            place = _placer(block, partial(getattr, attention, "token_grid"))
            yield BlockAttention(name, 0, index, attention.stage_spec, attention, place)
            continue
        grid = (embed.grid_size[0], embed.grid_size[1])
        mixer = _read_attention(attention, f"{name}.attn", grid, model.num_prefix_tokens)
        yield BlockAttention(name, 0, index, mixer.spec, mixer, _placer(block, token_grid), _lacking(attention))


def _check_own(attentions: list[nn.Module]) -> None:
    """Raise InputError if two blocks share their attention, since two mixers would not."""
    if len({id(attention) for attention in attentions}) < len(attentions):
        raise InputError("invalid attn, which several blocks share; expected one per block")


def _lacking(attention: Any) -> frozenset[str]:
    return frozenset({"out.bias"}) if attention.proj.bias is None else frozenset()


def _placer(block: nn.Module, token_grid: Callable[[], TokenGrid]) -> Callable[[MixerSpec, Mixer], None]:
    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        assert isinstance(mixer, AttentionMixer)
        mixer.stage_spec, mixer.token_grid, block.attn = stage_spec, token_grid(), mixer

    return place


def _read_own_block(block: Block, name: str, stage: int, index: int) -> BlockAttention:
    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        block.replace_mixer(stage_spec, mixer)

    return BlockAttention(name, stage, index, block.specs.mixer, block.attn, place)


def _swin_attentions(model: SwinTransformer) -> Iterator[BlockAttention]:
    _check_own([block.attn for layer in model.layers for block in layer.blocks])
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{index}"
            if isinstance(block, Block):
                yield _read_own_block(block, name, stage, index)
            elif isinstance(block, SwinMixerBlock):
                yield BlockAttention(name, stage, index, block.stage_spec, block.attn, _seat(layer, block, index))
            else:
                spec = window_spec(block, name, index, model._ref_window_sizes[stage])
                mixer = _read_windows(block, name, spec, index)
                yield BlockAttention(name, stage, index, spec, mixer, _seat(layer, block, index))


def _seat(layer: Any, block: nn.Module, index: int) -> Callable[[MixerSpec, Mixer], None]:
    def place(stage_spec: MixerSpec, mixer: Mixer) -> None:
        layer.blocks[index] = SwinMixerBlock(block, mixer, stage_spec, index)

    return place


# ---- reading ---------------------------------------------------------------------------------------------


def _read_attention(attention: Any, name: str, grid: Grid, prefix: int) -> AttentionMixer:
    """Return timm's Attention as a mixer with its weights. Raises InputError for an option that no spec describes."""
    if type(attention) is not Attention:
        kind = None if attention is None else type(attention).__name__
        raise InputError(f"{name}: invalid attention={kind}; expected timm's Attention, in a Block or "
                         "ResPostBlock")  # fmt: skip
    dim = attention.qkv.in_features
    unsupported = {
        "attn_head_dim": attention.attn_dim != dim, "dim_out": attention.proj.out_features != dim,
        "scale": attention.scale != attention.head_dim**-0.5, "gated": attention.gate is not None,
        "scale_norm": not isinstance(attention.norm, nn.Identity),
    }  # fmt: skip
    for field, present in unsupported.items():
        if present:
            raise InputError(f"invalid {name}: {field} has no place in a spec; expected timm's Attention without it")
    for norm in (attention.q_norm, attention.k_norm):
        if not isinstance(norm, nn.Identity):
            check_head_norm(norm, name)
    spec = PLAIN.override(bias=str(attention.qkv.bias is not None))
    mixer = AttentionMixer(
        spec, dim, attention.num_heads, grid, prefix=prefix, qk_norm=not isinstance(attention.q_norm, nn.Identity),
        attn_drop=attention.attn_drop.p, proj_drop=attention.proj_drop.p, dynamic_grid=True, device="meta",
    )  # fmt: skip
    return _take(mixer, attention, name)


def check_head_norm(norm: nn.Module, name: str) -> None:
    """Raise InputError unless `norm` is that of qk_norm per head: an affine LayerNorm with eps 1e-6."""
    affine = isinstance(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None
    if not (affine and norm.eps == HEAD_EPS):
        raise InputError(
            f"invalid norm_layer of qk_norm in {name}: {norm}; expected an affine LayerNorm, eps {HEAD_EPS}"
        )


def window_spec(block: Any, name: str, index: int, reference: Grid) -> MixerSpec:
    """Return the spec of timm's Swin block, with an alternating shift. Windows that the grid cuts keep the side of the
    stage's `reference`. The padding is ``timm`` where windows do not divide the grid, or the grid changes with the
    image.

    Raises:
        InputError: For another block or attention, windows larger than the grid (always_partition), or a shift that is
            not Swin's.
        SpecError: For windows that are not square.
    """
    if type(block) is not SwinTransformerBlock or type(block.attn) is not WindowAttention:
        raise InputError(f"{name}: invalid class {type(block).__name__}; expected timm's SwinTransformerBlock")
    grid, window = block.input_resolution, block.window_size
    if any(side > length for side, length in zip(window, grid, strict=True)):
        raise InputError(f"invalid always_partition=True in {name}: windows of {tuple(window)} exceed the grid "
                         f"{tuple(grid)}; expected False")  # fmt: skip
    expected = _shift(grid, window, index)
    if tuple(block.shift_size) != expected:
        raise InputError(f"{name}: invalid shift_size={tuple(block.shift_size)}; expected {expected}")
    cut = all(side == min(whole, length) for side, whole, length in zip(window, reference, grid, strict=True))
    side = square(reference if cut else window)
    padded = block.dynamic_mask or any(length > side and length % side for length in grid)
    text = f"support=window({side}, alternate{', pad=timm' if padded else ''}) bias={block.attn.qkv.bias is not None}"
    return MixerSpec.parse(text, STAGE)


def _read_windows(block: Any, name: str, spec: MixerSpec, index: int) -> Mixer:
    """Return timm's window attention as a mixer with its weights."""
    attention = block.attn
    dim = attention.qkv.in_features
    if attention.proj.in_features != dim:
        raise InputError(f"invalid head_dim in {name}, which has no place in a spec; expected dim // num_heads")
    mixer = Mixer(
        spec.at_block(index), dim, attention.num_heads, tuple(block.input_resolution), attn_drop=attention.attn_drop.p,
        proj_drop=attention.proj_drop.p, dynamic_grid=True, device="meta",
    )  # fmt: skip
    return _take(mixer, attention, name)


def _shift(grid: Grid, window: Grid, index: int) -> Grid:
    """The shift of block `index` in Swin: half a window in odd blocks, 0 along an axis that one window fills."""
    down, along = (side // 2 * (index % 2) if length > side else 0 for length, side in zip(grid, window, strict=True))
    return down, along


_PARTS = {
    "": (Attention, WindowAttention), "qkv": (nn.Linear,), "proj": (nn.Linear,), "q_norm": (nn.Identity, nn.LayerNorm),
    "k_norm": (nn.Identity, nn.LayerNorm), "attn_drop": (nn.Dropout,), "proj_drop": (nn.Dropout,),
    "norm": (nn.Identity,), "softmax": (nn.Softmax,),
}  # fmt: skip
"""The parts of timm's attention and their classes. A LayerNorm may be timm's subclass."""
_SOURCES = ATTENTION | {OUR_TABLE.partition(".")[0]: TABLE}
"""The parameter of timm that each of ours comes from."""


def _take(mixer: M, attention: Any, name: str) -> M:
    """Give `mixer` copies of the weights of timm's `attention`, with their dtype and requires_grad; a projection
    without bias gets zeros. Raises InputError for parts, hooks and parametrised weights that a mixer would not have."""
    for path, part in attention.named_modules():
        _check_part(part, _PARTS.get(path, ()), f"{name}.{path}".rstrip("."))
    like, sources = attention.qkv.weight, dict(attention.named_parameters())
    state = {path: tensor.detach().clone() for path, tensor in attention.state_dict().items()}
    state.setdefault("proj.bias", like.new_zeros(mixer.dim))
    translate(state, "", mixer.spec, mixer.entries)
    tensors = {}
    for entry in mixer.entries:
        part, _, kind = entry.name.partition(".")
        source = _SOURCES.get(part, part)
        origin = sources.get(source, sources.get(f"{source}.{kind}", like))
        tensors[entry.name] = nn.Parameter(state[entry.name], requires_grad=origin.requires_grad)
    mixer.assign(tensors)
    return mixer.train(attention.training)


def _check_part(part: nn.Module, kinds: tuple[type[nn.Module], ...], name: str) -> None:
    """Raise InputError unless a mixer can replace `part`."""
    expected = ", ".join(kind.__name__ for kind in kinds) or "timm's attention as it is"
    if type(part) not in kinds and not (isinstance(part, nn.LayerNorm) and nn.LayerNorm in kinds):
        raise InputError(
            f"invalid {name}, a {type(part).__name__} (an adapter, a parametrisation?); expected {expected}"
        )
    if "forward" in vars(part):
        raise InputError(f"invalid {name} with a forward of its own; expected that of its class")
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        raise InputError(f"invalid {name} with hooks; expected a module without, hooked afterwards")
    if any(not isinstance(tensor, (nn.Parameter, type(None))) for tensor in part._parameters.values()) or any(
        key.endswith(("_orig", "_mask")) for key in (*part._parameters, *part._buffers)
    ):
        raise InputError(f"invalid {name}, whose weight is computed (pruned); expected plain parameters")
