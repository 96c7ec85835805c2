"""Vision Transformers of timm whose attention takes tokens (B, T, C): ViT, DeiT, hybrids, EVA, DINOv3, Perception
Encoder, Qwen3-VL's and DeepSeek's encoders, BEiT, vit_relpos."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

from timm.layers import Attention
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.block import Block, TokenGrid
from kernelbank.nn.edit.stock.found import BlockAttention, Found, check_own, own_block
from kernelbank.nn.edit.stock.read import RELATIVE, Read, read_attention, relative_bias
from kernelbank.nn.edit.stock.rope import rotation
from kernelbank.nn.edit.stock.seats import AttentionMixer, RelativeMixer, RotaryMixer, token_placer
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import Grid

PLAIN = MixerSpec.parse("vit")
Reader = Callable[[Any, str], Read]


def vit(model: Any) -> Found:
    """VisionTransformer with any trunk: timm's Attention in its blocks, or in the branches of parallel blocks."""
    grid, token_grid = _grid(model, bool(model.dynamic_img_size))
    prefix = model.num_prefix_tokens

    def read(attention: Any, name: str) -> Read:
        if type(attention) is not Attention:
            raise _refused(attention, name, "timm's Attention")
        return read_attention(AttentionMixer, attention, name, PLAIN, grid, prefix=prefix)

    yield from in_blocks(model, read, token_grid)


def eva(model: Any) -> Found:
    """Eva: EVA and EVA-02, DINOv3, Perception Encoder, `vit_*_rope_*`."""
    grid, token_grid = _grid(model, bool(model.dynamic_img_size))
    yield from in_blocks(model, _rotary(model.rope, grid, model.num_prefix_tokens), token_grid)


def encoder(model: Any) -> Found:
    """The vision encoders of Qwen3-VL and DeepSeek, which take every image size."""
    grid, token_grid = _grid(model, True)
    yield from in_blocks(model, _rotary(model.rope, grid, model.num_prefix_tokens), token_grid)


def classifier(model: Any) -> Found:
    """An encoder inside a classifier."""
    for found in encoder(model.encoder):
        yield _below(found, "encoder")


def beit(model: Any) -> Found:
    """BEiT: a relative table in each block, or one that they share. A mixer in each block has a table of its own."""
    grid, token_grid = _grid(model, False)
    shared = model.rel_pos_bias

    def read(attention: Any, name: str) -> Read:
        biases = [] if shared is None else [shared()]
        if attention.relative_position_bias_table is not None:
            biases.append(attention._get_rel_pos_bias())
        bias: Tensor | None = sum(part.flatten(0, -3) for part in biases) if biases else None
        return read_attention(RelativeMixer, attention, name, _positions(bias), grid, prefix=1, bias=bias)

    yield from in_blocks(model, read, token_grid)


def relpos(model: Any) -> Found:
    """VisionTransformerRelPos: a relative bias from a table or an MLP in each block, or one that they share. A mixer in
    each block has a table of its own."""
    grid, token_grid = _grid(model, False)
    shared = relative_bias(model.shared_rel_pos, "shared")

    def read(attention: Any, name: str) -> Read:
        own = relative_bias(attention.rel_pos, name)
        bias = shared if own is None else own
        return read_attention(RelativeMixer, attention, name, _positions(bias), grid, prefix=model.num_prefix_tokens,
                              bias=bias, parts=RELATIVE)  # fmt: skip

    yield from in_blocks(model, read, token_grid)


# ---- what they share -------------------------------------------------------------------------------------


def _grid(model: Any, dynamic: bool) -> tuple[Grid, Callable[[], TokenGrid]]:
    """The grid of the tokens, and what looks it up in a forward, made when the first mixer is placed. Raises InputError
    for dropped patches."""
    drop = getattr(model, "patch_drop", None)
    if isinstance(drop, nn.Module) and not isinstance(drop, nn.Identity):
        raise InputError("invalid patch_drop_rate: dropped patches have no place on the grid; expected 0")
    height, width = model.patch_embed.grid_size
    return (height, width), cache(lambda: TokenGrid(model.patch_embed, dynamic))


def in_blocks(model: Any, read: Reader, token_grid: Callable[[], Callable[[int], Grid]]) -> Iterator[BlockAttention]:
    """The attention of every block of `model.blocks`, read by `read`."""
    slots = [slot for index, block in enumerate(model.blocks) for slot in _slots(block, f"blocks.{index}")]
    check_own([owner.attn for owner, _ in slots if hasattr(owner, "attn")])
    for index, (owner, name) in enumerate(slots):
        attention = getattr(owner, "attn", None)
        if isinstance(owner, Block):
            yield own_block(owner, name, 0, index)
        elif isinstance(attention, AttentionMixer):
            place = token_placer(owner, "attn", partial(getattr, attention, "token_grid"))
            yield BlockAttention(f"{name}.attn", 0, index, attention.stage_spec, attention, place)
        elif attention is None:
            raise InputError(f"{name}.attn: invalid attention=None; expected timm's Attention, in a block that has one")
        else:
            found = read(attention, f"{name}.attn")
            place = token_placer(owner, "attn", token_grid)
            yield BlockAttention(f"{name}.attn", 0, index, found.mixer.spec, found.mixer, place, found.lacking)


def _slots(block: Any, name: str) -> Iterator[tuple[Any, str]]:
    """The modules whose `attn` is an attention: a block, or the branches of a parallel one."""
    if isinstance(getattr(block, "attns", None), nn.ModuleList):
        yield from ((branch, f"{name}.attns.{number}") for number, branch in enumerate(block.attns))
    else:
        yield block, name


def _rotary(rope: Any, grid: Grid, prefix: int) -> Reader:
    """Reads AttentionRope and EvaAttention, with the rotation that `rope` gives them, or None."""

    def read(attention: Any, name: str) -> Read:
        if type(attention).__name__ not in ("AttentionRope", "EvaAttention"):
            raise _refused(attention, name, "timm's AttentionRope or EvaAttention")
        if getattr(attention, "num_kv_groups", 1) > 1:
            raise InputError(f"invalid {name}: num_kv_heads has no place in a spec; expected as many as heads")
        spec = PLAIN
        if rope is not None:
            if attention.num_prefix_tokens != prefix:
                raise InputError(
                    f"invalid num_prefix_tokens={attention.num_prefix_tokens} of {name}; expected {prefix}"
                )
            spec = PLAIN.override(position=rotation(rope, attention.rotate_half, grid, attention.head_dim))
        return read_attention(RotaryMixer, attention, name, spec, grid, prefix=prefix)

    return read


def _positions(bias: Tensor | None) -> MixerSpec:
    return PLAIN if bias is None else PLAIN.override(position="relative")


def _refused(module: object, name: str, expected: str) -> InputError:
    return InputError(f"{name}: invalid attention={type(module).__name__}; expected {expected}")


def _below(found: Any, prefix: str) -> Any:
    return replace(found, name=f"{prefix}.{found.name}")
