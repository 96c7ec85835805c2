"""The definition: one query, one kernel and one equation at a time, over visible entries only, without changes for
speed. The outputs and gradients of every other path are compared with this one in float64.

It shares with the other paths only the visibility (`geometry.visibility`) and the published paddings
(`geometry.pad_tokens`). B images, T = P + N tokens, C channels, h heads of d, n kernels, t = size^2 taps.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernelbank.ops.context import Context, Params
from kernelbank.ops.geometry import crop, pad_tokens
from kernelbank.spec import Box, Dynamic, Full, Pool, Predict, Project, Relative, Rope, TwoStep
from kernelbank.spec.inventory import bank_size
from kernelbank.spec.pipeline import Step

EPS = 1e-6


def mixer(x: Tensor, p: Params, s: Context) -> Tensor:
    """linear layer -> dynamic convolutions -> linear layer, on tokens (B, T, C)."""
    x = pad_tokens(x, s.geo)
    match s.spec.frame:
        case "bare":
            operand = source = x
        case "linear":
            operand, source = affine(x, p, "q"), x
        case _:
            operand = source = batch_norm(affine(x, p, "q"), p, "q_norm", s).clamp(min=0)
    o = (two_step if isinstance(s.spec.kernel, TwoStep) else one_step)(operand, source, p, s)
    match s.spec.frame:
        case "linear":
            o = affine(o, p, "out")
        case "bn_relu":
            o = affine(batch_norm(o, p, "out_norm", s).clamp(min=0), p, "out")
            o = batch_norm(o, p, "last_norm", s)
    return crop(o, s.geo)


# ---- linear layers and norms -----------------------------------------------------------------------------


def affine(x: Tensor, p: Params, name: str) -> Tensor:
    """y = W x + b."""
    y = torch.einsum("oc,...c->...o", p[f"{name}.weight"], x)
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def normalise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps)."""
    return (x - mean) / torch.sqrt(var + eps)


def batch_norm(x: Tensor, p: Params, name: str, s: Context, eps: float = 1e-5) -> Tensor:
    """BatchNorm over every axis but the last. The biased variance normalises, the unbiased one is stored."""
    mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    if s.training:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 1 and name != "activation_norm":
            raise ValueError(
                f"{name}: invalid batch of one token; expected more than one value per channel in training"
            )
        running, (mean, var) = (mean, var), (rows.mean(0), rows.var(0, unbiased=False))
        with torch.no_grad():
            for old, new in zip(running, (mean, var * len(rows) / max(len(rows) - 1, 1)), strict=True):
                old.copy_(0.9 * old + 0.1 * new)
    return normalise(x, mean, var, eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def head_norm(x: Tensor, p: Params, name: str, s: Context) -> Tensor:
    """x normalised over the d channels of each head, the last axis."""
    assert isinstance(s.spec.kernel, TwoStep)
    match s.spec.kernel.norm:
        case "layernorm":
            mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
            return normalise(x, mean, var, EPS) * p[f"{name}.weight"] + p[f"{name}.bias"]
        case "rmsnorm":
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * p[f"{name}.weight"]
        case "l2":
            return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
        case _:
            return x


# ---- the grid --------------------------------------------------------------------------------------------


def patch(x: Tensor, i: int, s: Context) -> Tensor:
    """The size x size neighbours of token i, (B, C, t), row by row; zeros outside the grid, and around a prefix
    token, which is its own 1 x 1 grid."""
    (H, W), P, half = s.geo.grid, s.geo.prefix, s.spec.size // 2
    columns = []
    for dy in range(-half, half + 1):
        for dx in range(-half, half + 1):
            y, x_ = divmod(i - P, W) if i >= P else (0, 0)
            rows, width = (H, W) if i >= P else (1, 1)
            inside = 0 <= y + dy < rows and 0 <= x_ + dx < width
            columns.append(x[:, i + dy * W + dx] if inside else torch.zeros_like(x[:, i]))
    return torch.stack(columns, -1)


def cells(x: Tensor, s: Context) -> Tensor:
    """The features that generate the bank: prefix tokens as they are, then the mean of each s x s cell."""
    assert isinstance(s.spec.bank, Dynamic)
    (H, W), P, stride = s.geo.grid, s.geo.prefix, s.spec.bank.stride
    features = [x[:, i] for i in range(P)]
    for top in range(0, H, stride):
        for left in range(0, W, stride):
            members = [
                P + y * W + c for y in range(top, min(top + stride, H)) for c in range(left, min(left + stride, W))
            ]
            features.append(x[:, members].mean(1))
    return torch.stack(features, 1)


def seen(i: int, b: int, s: Context) -> list[int]:
    """V_i: the kernels that query i of image b sees, by index."""
    n = s.spec.mix.r if isinstance(s.spec.mix, Project) else bank_size(s.spec, s.dim, s.geo.grid, s.geo.prefix)
    kernels = list(range(n)) if s.geo.visible is None else s.geo.visible[i].nonzero()[:, 0].tolist()
    if s.mask is None:
        return kernels
    row = s.mask[b if len(s.mask) > 1 else 0, 0, i]
    return [j for j in kernels if bool(row[j])]


def position(i: int, j: int, p: Params, s: Context) -> Tensor:
    """p_ij (h): the table at offset i - j, in steps of the support, or one of the three prefix entries."""
    P, W = s.geo.prefix, s.geo.grid[1]
    if i < P or j < P:
        return p["table.prefix"][:, 2 if i < P and j < P else 0 if i < P else 1]
    a, b = (side + 1 for side in p["table.weight"].shape[1:])
    (yi, xi), (yj, xj), (down, along) = divmod(i - P, W), divmod(j - P, W), s.geo.steps
    return p["table.weight"][:, (yi - yj) // down + a // 2 - 1, (xi - xj) // along + b // 2 - 1]


def rotated(x: Tensor, i: int, s: Context) -> Tensor:
    """x (..., d) of token i with each pair of channels (a, b) turned into (a cos - b sin, b cos + a sin)."""
    if not isinstance(s.spec.position, Rope) or i < s.geo.prefix:
        return x
    rope, d, (H, W) = s.spec.position, x.shape[-1], s.geo.grid
    y, column = divmod(i - s.geo.prefix, W)
    if rope.coordinates == "unit":
        places = [2 * math.pi * (2 * (at + 0.5) / side - 1) for at, side in ((y, H), (column, W))]
    else:
        places = [
            (at + rope.origin) * (1 if rope.side == "grid" else rope.side / side) for at, side in ((y, H), (column, W))
        ]
    angles = [
        place * rope.theta ** (-k / (d // 4))
        for place in (places if rope.axes == "yx" else places[::-1])
        for k in range(d // 4)
    ]
    turned = [x[..., c] for c in range(d)]
    for k, angle in enumerate(angles):
        one, other = (k, k + d // 2) if rope.layout == "half" else (2 * k, 2 * k + 1)
        a, b = x[..., one], x[..., other]
        turned[one] = a * math.cos(angle) - b * math.sin(angle)
        turned[other] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(turned, -1)


# ---- kernels ---------------------------------------------------------------------------------------------


def squash(w: Tensor, s: Context) -> Tensor:
    """The function that is applied to generated weights."""
    assert isinstance(s.spec.bank, Dynamic)
    return {"identity": w, "sigmoid": 1 / (1 + torch.exp(-w)), "tanh": torch.tanh(w)}[s.spec.bank.squash]


def reduced(features: Tensor, p: Params, s: Context) -> Tensor:
    """The bottleneck of a generator, if there is one: conv, in bn_relu a BatchNorm, ReLU."""
    if "reduce.weight" not in p:
        return features
    hidden = affine(features, p, "reduce")
    if s.spec.frame == "bn_relu":
        hidden = batch_norm(hidden, p, "reduce_norm", s)
    return hidden.clamp(min=0)


def two_step_kernels(source: Tensor, p: Params, s: Context) -> tuple[Tensor, Tensor]:
    """k (B, h, n, d, t) and v (B, h, n, d), after `project`."""
    B, (h, d) = len(source), (s.heads, s.dim // s.heads)
    if not isinstance(s.spec.bank, Dynamic):
        k = p["key.weight"].reshape(h, -1, d, s.spec.size**2)
        return k.expand(B, -1, -1, -1, -1), p["value.weight"].reshape(h, d, -1).mT.expand(B, -1, -1, -1)
    hidden = reduced(cells(source, s), p, s)
    k = squash(affine(hidden, p, "key"), s).unflatten(-1, (h, d, -1))
    k = head_norm(k.mT, p, "k_norm", s).mT.transpose(1, 2)
    if isinstance(s.spec.position, Rope):  # of size 1
        k = torch.stack([rotated(k[:, :, j, :, 0], j, s) for j in range(k.shape[2])], 2)[..., None]
    v = squash(affine(hidden, p, "value"), s).unflatten(-1, (h, d)).transpose(1, 2)
    if isinstance(s.spec.mix, Project):
        k = torch.einsum("nr,bhndt->bhrdt", p["E"], k)
        v = torch.einsum("nr,bhnd->bhrd", p["E" if s.spec.mix.shared else "F"], v)
    return k, v


def two_step(operand: Tensor, source: Tensor, p: Params, s: Context) -> Tensor:
    """s_ij = q_i . k_j / sqrt(d) + p_ij, with a learned scale in the place of 1 / sqrt(d) if the kernel has one,
    a = phi(s) over what is visible, o_i = sum_j a_ij v_j."""
    (B, T, _), h = operand.shape, s.heads
    k, v = two_step_kernels(source, p, s)
    if isinstance(s.spec.bank, Dynamic):
        operand = head_norm(operand.unflatten(-1, (h, -1)), p, "q_norm", s).flatten(2)
    scale = operand.new_full((h,), (s.dim // h) ** -0.5 if isinstance(s.spec.bank, Dynamic) else 1.0)
    if "logit_scale" in p:
        scale = torch.exp(p["logit_scale"]).clamp(max=100)
    table: Table = {}
    for i in range(T):
        q = patch(operand, i, s).unflatten(1, (h, -1))  # (B, h, d, t)
        if isinstance(s.spec.position, Rope):
            q = rotated(q[..., 0], i, s)[..., None]
        for b in range(B):
            for j in seen(i, b, s):
                score = scale * (q[b] * k[b, :, j]).sum((-1, -2))
                if "key.bias" in p and not isinstance(s.spec.bank, Dynamic):
                    score = score + p["key.bias"].reshape(h, -1)[:, j]
                table[b, i, j] = score + position(i, j, p, s) if isinstance(s.spec.position, Relative) else score
    for index, step in enumerate(s.spec.activation):
        table = activate(table, step, s.spec.activation[index + 1 :], p, s)
    rows = [[v.new_zeros(h, v.shape[-1]) for _ in range(T)] for _ in range(B)]
    for (b, i, j), a in table.items():
        rows[b][i] = rows[b][i] + a[:, None] * v[b, :, j]
    o = torch.stack([torch.stack(row) for row in rows]).flatten(2)
    return o + p["value.bias"] if "value.bias" in p and not isinstance(s.spec.bank, Dynamic) else o


def one_step(operand: Tensor, source: Tensor, p: Params, s: Context) -> Tensor:
    """o_i = sum_t w_it q_{i+t} with the kernel of position i, plus sum_j p_ij sum_t k_jt."""
    match s.spec.bank:
        case Box():
            return torch.stack([box(operand, i, s) for i in range(operand.shape[1])], 1)
        case Dynamic():
            return dynamic_one_step(operand, source, p, s)
        case _:
            return static_one_step(operand, source, p, s)


def box(x: Tensor, i: int, s: Context) -> Tensor:
    """The mean of the taps inside the grid minus the centre."""
    inside = patch(torch.ones_like(x), i, s)
    return patch(x, i, s).sum(-1) / inside.sum(-1) - x[:, i]


def dynamic_one_step(operand: Tensor, source: Tensor, p: Params, s: Context) -> Tensor:
    """The kernel of position i is the mean of the kernels it sees, or generated from their mean feature."""
    features, (B, T, C), R = cells(source, s), operand.shape, s.shared

    def over(values: Tensor) -> Tensor:
        if s.geo.visible is None and s.mask is None:  # the mean is the same for every position
            return values.mean(1, keepdim=True)
        picked = [[values[b, seen(i, b, s)].sum(0) / max(len(seen(i, b, s)), 1) for i in range(T)] for b in range(B)]
        return torch.stack([torch.stack(row) for row in picked])

    def generate(z: Tensor) -> Tensor:
        return squash(affine(reduced(z, p, s), p, "key"), s)

    taps = None if isinstance(s.spec.mix, Pool) else generate(features).unflatten(-1, (R, -1))  # (B, n, R, t)
    kernel = generate(over(features)).unflatten(-1, (R, -1)) if taps is None else over(taps)
    outputs = []
    for i in range(T):
        w = kernel[:, i if kernel.shape[1] > 1 else 0].repeat_interleave(C // R, 1)  # (B, C, t)
        o = (w * patch(operand, i, s)).sum(-1)
        if isinstance(s.spec.position, Relative):
            assert taps is not None
            summed = taps.sum(-1).unflatten(-1, (s.heads, -1))  # (B, n, h, d)
            terms = [
                sum(
                    (position(i, j, p, s)[:, None] * summed[b, j] for j in seen(i, b, s)),
                    torch.zeros_like(summed[b, 0]),
                )
                for b in range(B)
            ]
            o = o + torch.stack(terms).flatten(1)
        outputs.append(o + p["bias"] if "bias" in p else o)
    return torch.stack(outputs, 1)


def static_one_step(operand: Tensor, source: Tensor, p: Params, s: Context) -> Tensor:
    """y_o = sum_ct W_oct x_ct in each group, W the one kernel of the bank or pi_k W_k summed over k."""
    weight, bias = p["weight"].flatten(3), p.get("bias")  # (K, out, C_in/g, t)
    pi = weight.new_ones(len(operand), 1)
    if isinstance(s.spec.mix, Predict):
        z = source.mean(1)
        if s.spec.mix.r is not None:
            z = affine(z, p, "reduce").clamp(min=0)
        z = affine(z, p, "predict")
        z = z / (s.temperature if s.training and s.temperature is not None else s.spec.mix.tau)
        soft = s.spec.mix.gate == "softmax"
        pi = torch.exp(z - torch.logsumexp(z, -1, keepdim=True)) if soft else 1 / (1 + torch.exp(-z))
    w = torch.einsum("bk,koct->boct", pi, weight)
    if not isinstance(s.spec.kernel, Full):
        w = w.repeat_interleave(s.dim // w.shape[1], 1)
    g = s.groups if isinstance(s.spec.kernel, Full) else s.dim
    outputs = []
    for i in range(operand.shape[1]):
        taps = patch(operand, i, s).unflatten(1, (g, -1))  # (B, g, C_in/g, t)
        outputs.append(torch.einsum("bgoct,bgct->bgo", w.unflatten(1, (g, -1)), taps).flatten(1))
    y = torch.stack(outputs, 1)
    return y if bias is None else y + torch.einsum("bk,kc->bc", pi, bias)[:, None]


# ---- activation ------------------------------------------------------------------------------------------

Table = dict[tuple[int, int, int], Tensor]
"""Scores per head (h), by image, query and kernel: an entry that is not visible does not exist."""


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a,
    "relu": lambda a: a.clamp(min=0),
    "relu2": lambda a: a.clamp(min=0) ** 2,
    "cube": lambda a: a * a * a,
    "gelu": lambda a: a * (1 + torch.erf(a / math.sqrt(2))) / 2,
    "gelu_tanh": lambda a: a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2,
    "quick_gelu": lambda a: a / (1 + torch.exp(-1.702 * a)),
    "silu": lambda a: a / (1 + torch.exp(-a)),
    "exp": torch.exp,
    "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
    "softplus": lambda a: torch.log1p(torch.exp(a)),
    "tanh": torch.tanh,
}

# Each takes the visible entries of one row (or, @positions, one column) as (n, h).
OVER: dict[str, Callable[[Tensor], Tensor]] = {
    "log_count": lambda a: a - math.log(len(a)),
    "count": lambda a: a / len(a),
    "sqrt_count": lambda a: a / math.sqrt(len(a)),
    "l1": lambda a: a / a.abs().sum(0).clamp(min=EPS),
    "l2": lambda a: a / torch.sqrt((a**2).sum(0).clamp(min=EPS**2)),
    "rmsnorm": lambda a: a / torch.sqrt((a**2).mean(0) + EPS),
    "center": lambda a: a - a.mean(0),
    "layernorm": lambda a: normalise(a, a.mean(0), a.var(0, unbiased=False), EPS),
}


def activate(table: Table, step: Step, after: tuple[Step, ...], p: Params, s: Context) -> Table:
    """One step of the pipeline over the table."""
    if step.argument is not None:  # scale(x)
        return {key: a * step.argument for key, a in table.items()}
    if step.name == "batchnorm":
        normed = batch_norm(torch.stack(list(table.values())), p, "activation_norm", s, EPS)
        return dict(zip(table, normed, strict=True))
    if step.name in OVER:
        return over_lines(table, step.axis == "positions", OVER[step.name])
    if step.name == "exp" and after and after[0].name in ("l1", "l2"):
        return over_lines(table, after[0].axis == "positions", lambda a: torch.exp(a - a.detach().amax(0)))
    return {key: POINTWISE[step.name](a) for key, a in table.items()}


def over_lines(table: Table, positions: bool, function: Callable[[Tensor], Tensor]) -> Table:
    """A normaliser over the kernels that each query sees, or over the queries that see each kernel."""
    lines: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for b, i, j in table:
        lines.setdefault((b, j if positions else i), []).append((b, i, j))
    result: Table = {}
    for keys in lines.values():
        result |= dict(zip(keys, function(torch.stack([table[key] for key in keys])), strict=True))
    return result
