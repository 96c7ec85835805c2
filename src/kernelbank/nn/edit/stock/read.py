"""Read the weights of timm's token mixers as those of mixers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp, RmsNorm
from timm.layers.norm import RmsNormFp32
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.nn.edit.carry import M
from kernelbank.ops.geometry import relative_offsets
from kernelbank.ops.normed import HEAD_EPS
from kernelbank.spec import MixerSpec, TwoStep
from kernelbank.spec.inventory import Grid

RELATIVE = (RelPosBias, RelPosBiasTf, RelPosMlp)
_KINDS = (nn.Linear, nn.Identity, nn.Dropout, nn.Softmax)
"""The parts of an attention that a mixer can replace, besides those that its adapter names."""


@dataclass(frozen=True)
class Origin:
    """A tensor of a mixer as the model has it: its value, a copy, and whether it is trained."""

    value: Tensor
    trained: bool


Origins = dict[str, Origin]
"""Tensors of a mixer by their inventory name."""


def origin(parameter: Tensor, value: Tensor | None = None) -> Origin:
    """`value`, or `parameter` itself, copied, trained as `parameter` is."""
    return Origin((parameter if value is None else value).detach().clone(), parameter.requires_grad)


def assigned(mixer: M, origins: Mapping[str, Origin], module: nn.Module) -> M:
    """Give `mixer` the tensors of `origins`, zeros where it has more, and the mode of `module`."""
    like = next(iter(origins.values())).value if origins else torch.empty(())
    mixer.assign({
        entry.name: nn.Parameter(found.value, found.trained)
        if (found := origins.get(entry.name))
        else nn.Parameter(like.new_zeros(entry.shape))
        for entry in mixer.entries
    })  # fmt: skip
    return mixer.train(module.training)


@dataclass(frozen=True)
class Read:
    """A mixer with the weights of an attention, and the names of its tensors that the attention does not have."""

    mixer: Any
    lacking: frozenset[str]


def read_attention(
    kind: type[M], attention: Any, name: str, spec: MixerSpec, grid: Grid, *, prefix: int = 0,
    bias: Tensor | None = None, head_first: bool = False, parts: tuple[type[nn.Module], ...] = (), block: int = 0,
    inner_norm: bool = False,
) -> Read:  # fmt: skip
    """Return timm's `attention` as a mixer of `kind` with its weights.

    Args:
        name: The name of the attention in the model, for errors.
        spec: The spec of the stage; whether q, k and v have biases is read.
        grid: The grid, or for windows one at least as large.
        prefix: The number of tokens before the grid.
        bias: The relative bias (h, T, T) of a position relative on `grid`, or on what a window holds.
        head_first: Whether the rows of the fused projection are those of one head after another.
        parts: The classes of other modules that the attention consists of.
        block: The index of the block, which resolves an alternating shift.
        inner_norm: Whether the attention norms its input itself (TinyViT), which its block then does.

    Raises:
        InputError: For an option that no spec describes, and for parts, hooks and parametrised weights that a mixer
            would not have.
    """
    check_parts(attention, name, parts)
    heads: int = attention.num_heads if hasattr(attention, "num_heads") else attention.heads
    origins = projections(attention, name, heads, head_first)
    check_options(attention, name, heads, origins, inner_norm)
    spec = spec.override(bias=str("q.bias" in origins))
    if isinstance(getattr(attention, "q_norm", None), nn.Module):
        spec, norms = _with_norms(spec, attention, name)
        origins |= norms
    dim = origins["q.weight"].value.shape[1]
    mixer = kind(
        spec.at_block(block), dim, heads, grid, prefix=prefix, attn_drop=_rate(attention, "attn_drop"),
        proj_drop=_rate(attention, "proj_drop"), dynamic_grid=True, device="meta",
    )  # fmt: skip
    if bias is not None:
        origins |= table(bias, mixer.entries, prefix, name)
    if hasattr(attention, "logit_scale"):
        origins["logit_scale"] = origin(attention.logit_scale, attention.logit_scale.flatten())
    lacking = frozenset(entry.name for entry in mixer.entries) - set(origins)
    return Read(assigned(mixer, origins, attention), lacking)


def projections(attention: Any, name: str, heads: int, head_first: bool = False) -> Origins:
    """q, key, value and out of an attention whose projections are fused (`qkv`) or not (`q_proj`, `k_proj`, `v_proj`),
    as linear layers or 1 x 1 convs, with biases in them or beside them (`q_bias`, `v_bias`)."""
    found: Origins = {}
    if getattr(attention, "qkv", None) is not None:
        for kind in ("weight", "bias"):
            if (fused := getattr(attention.qkv, kind)) is not None:
                parts = _split(_flat(fused), heads, head_first, f"{name}.qkv")
                found |= {f"{ours}.{kind}": origin(fused, part)
                          for ours, part in zip(("q", "key", "value"), parts, strict=True)}  # fmt: skip
        for ours, theirs in (("q", "q_bias"), ("value", "v_bias")):
            if (beside := getattr(attention, theirs, None)) is not None:
                found[f"{ours}.bias"] = origin(beside)
    else:
        for ours, theirs in (("q", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            found |= linear(ours, getattr(attention, theirs))
    return found | linear("out", attention.proj)


def linear(name: str, layer: Any) -> Origins:
    """A linear layer or 1 x 1 conv under our `name`."""
    tensors = {f"{name}.{kind}": getattr(layer, kind) for kind in ("weight", "bias")}
    return {key: origin(tensor, _flat(tensor)) for key, tensor in tensors.items() if tensor is not None}


def kernel(layer: nn.Conv2d, entries: Any) -> Origins:
    """The kernel and bias of a conv in the shapes of the `entries` of a static bank of one kernel."""
    return {entry.name: origin(tensor, tensor.reshape(entry.shape))
            for entry in entries if (tensor := getattr(layer, entry.name)) is not None}  # fmt: skip


def _flat(tensor: Tensor) -> Tensor:
    """The weight of a 1 x 1 conv as that of a linear layer."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def _split(fused: Tensor, heads: int, head_first: bool, name: str) -> tuple[Tensor, ...]:
    if fused.shape[0] % (3 * heads):
        raise InputError(f"invalid {name} of {fused.shape[0]} outputs; expected three times those of {heads} heads")
    if not head_first:
        return fused.chunk(3)
    return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (heads, 3, -1)).unbind(1))


def _rate(attention: Any, field: str) -> float:
    layer = getattr(attention, field, None)
    return float(layer.p) if isinstance(layer, nn.Dropout) else 0.0


# ---- relative positions ----------------------------------------------------------------------------------


def table(bias: Tensor, entries: Any, prefix: int, name: str) -> Origins:
    """The relative bias (h, T, T) as a table over offsets, and one entry each from the prefix, to it and inside it.

    Raises: InputError: If the bias is no function of the offset.
    """
    shape = next(entry.shape for entry in entries if entry.name == "table.weight")
    grid = (shape[1] // 2 + 1, shape[2] // 2 + 1)
    count = shape[1] * shape[2] + 3 * (prefix > 0)
    values = bias.new_empty(shape[0], count)
    flat_bias = bias.reshape(shape[0], -1)
    if flat_bias.shape[1] != (prefix + grid[0] * grid[1]) ** 2:
        raise InputError(f"invalid relative bias of {name} of shape {tuple(bias.shape)}; expected that of {grid}")
    if not bias.is_meta:
        offsets = relative_offsets(grid, grid, prefix, bias.device).flatten()
        values = values.index_copy(1, offsets, flat_bias)
        if not torch.equal(values[:, offsets], flat_bias):
            raise InputError(f"invalid relative bias of {name}, which is no function of the offset")
    flat, rest = values[:, : shape[1] * shape[2]], values[:, shape[1] * shape[2] :]
    found = {"table.weight": Origin(flat.reshape(shape).detach().clone(), bias.requires_grad)}
    return found | ({"table.prefix": Origin(rest.detach().clone(), bias.requires_grad)} if prefix else {})


def relative_bias(module: Any, name: str) -> Tensor | None:
    """The bias (h, T, T) of one of timm's modules for relative positions, which are a table, or computed from the
    offsets by an MLP; None without one. Raises InputError for another class."""
    if module is None:
        return None
    if type(module) not in RELATIVE:
        raise InputError(f"invalid {name}.rel_pos, a {type(module).__name__}; expected one of "
                         f"{', '.join(kind.__name__ for kind in RELATIVE)}")  # fmt: skip
    bias: Tensor = module.get_bias()
    return bias


# ---- what a mixer does not have --------------------------------------------------------------------------


def check_options(attention: Any, name: str, heads: int, origins: Origins, inner_norm: bool = False) -> None:
    """Raise InputError for an option of timm's attention that no spec describes."""
    width = origins["q.weight"].value.shape[1]
    unsupported = {
        "attn_head_dim": {origins[f"{part}.weight"].value.shape for part in ("q", "key", "value", "out")}
        != {(width, width)},
        "scale": getattr(attention, "scale", (width // heads) ** -0.5) != (width // heads) ** -0.5,
        "gated": getattr(attention, "gate", None) is not None,
        "scale_norm": not inner_norm and not isinstance(getattr(attention, "norm", None), (nn.Identity, type(None))),
    }  # fmt: skip
    for field, present in unsupported.items():
        if present:
            kind = type(attention).__name__
            raise InputError(f"invalid {name}: {field} has no place in a spec; expected timm's {kind} without it")


def _with_norms(spec: MixerSpec, attention: Any, name: str) -> tuple[MixerSpec, Origins]:
    """`spec` with the norm of queries and keys per head that `attention` has, and its tensors. Raises InputError for
    another norm than an affine LayerNorm or RMSNorm with the epsilon of the operator."""
    norms = {side: getattr(attention, side) for side in ("q_norm", "k_norm")}
    if all(isinstance(norm, nn.Identity) for norm in norms.values()):
        return spec, {}
    kinds = {head_norm_kind(norm, name) for norm in norms.values()}
    if len(kinds) > 1:
        raise InputError(f"invalid norms of {name}, which differ between q and k; expected the same")
    assert isinstance(spec.kernel, TwoStep)
    tensors = {
        f"{side}.{key}": origin(tensor) for side, norm in norms.items() for key, tensor in norm.named_parameters()
    }
    return replace(spec, kernel=replace(spec.kernel, norm=kinds.pop())), tensors


def head_norm_kind(norm: Any, name: str) -> Literal["layernorm", "rmsnorm"]:
    """The kind of a norm per head. Raises InputError unless it is an affine LayerNorm or RMSNorm with eps 1e-6."""
    tensors = {key for key, _ in norm.named_parameters()}
    if getattr(norm, "eps", None) == HEAD_EPS:
        if isinstance(norm, nn.LayerNorm) and tensors == {"weight", "bias"}:
            return "layernorm"
        if isinstance(norm, (RmsNorm, RmsNormFp32, nn.RMSNorm)) and tensors == {"weight"}:
            return "rmsnorm"
    raise InputError(f"invalid norm_layer of qk_norm in {name}: {norm}; expected an affine LayerNorm or RMSNorm, "
                     f"eps {HEAD_EPS}")  # fmt: skip


def check_parts(attention: nn.Module, name: str, parts: tuple[type[nn.Module], ...] = ()) -> None:
    """Raise InputError unless a mixer can replace `attention` with everything inside it. Modules of the classes in
    `parts` are taken as they are, with what they consist of."""
    whole = [path for path, part in attention.named_modules() if type(part) in parts and path]
    for path, part in attention.named_modules():
        if not any(path == outer or path.startswith(f"{outer}.") for outer in whole):
            _check_part(part, (type(attention), *_KINDS, *parts) if not path else (*_KINDS, *parts), f"{name}.{path}")


def _check_part(part: nn.Module, kinds: tuple[type[nn.Module], ...], name: str) -> None:
    name = name.rstrip(".")
    norms = isinstance(part, nn.LayerNorm) or name.endswith(("q_norm", "k_norm"))
    if type(part) not in kinds and not norms:
        raise InputError(f"invalid {name}, a {type(part).__name__} (an adapter, a parametrisation?); expected timm's "
                         "attention as it is")  # fmt: skip
    if "forward" in vars(part):
        raise InputError(f"invalid {name} with a forward of its own; expected that of its class")
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        raise InputError(f"invalid {name} with hooks; expected a module without, hooked afterwards")
    if any(not isinstance(tensor, (nn.Parameter, type(None))) for tensor in part._parameters.values()) or any(
        key.endswith(("_orig", "_mask")) for key in (*part._parameters, *part._buffers)
    ):
        raise InputError(f"invalid {name}, whose weight is computed (pruned); expected plain parameters")
