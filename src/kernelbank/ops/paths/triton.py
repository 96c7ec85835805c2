"""The Triton kernels of `ops.kernels` as paths. They run on CUDA GPUs, and in Triton's interpreter for tests.

No path here is taken by itself but on the device families in `AHEAD`, for each of which a run record in ``records/gpu``
shows it faster than what would run otherwise. Elsewhere ``use_path("triton_pointwise")`` takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor

from kernelbank.ops.bank import TwoStepBank, generate_taps, generator_dtype
from kernelbank.ops.context import Call, Context, Params
from kernelbank.ops.geometry import cached
from kernelbank.ops.kernels.depthwise import depthwise_attention
from kernelbank.ops.kernels.launch import DTYPES, OLDEST, WIDEST_HEAD, available, gpu, interpreted
from kernelbank.ops.kernels.layout import shared_memory
from kernelbank.ops.kernels.moments import moments_attention
from kernelbank.ops.kernels.pointwise import pointwise_attention
from kernelbank.ops.kernels.regions import MOST_CELLS, region_attention
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.closed_form import affine, moments
from kernelbank.ops.paths.framed import attending, framed
from kernelbank.ops.paths.path import (
    MixerPath,
    PositionPath,
    Reason,
    first,
    half_precision,
    needs_every_kernel,
    needs_no_dropout,
    needs_one_step,
    needs_two_step,
)
from kernelbank.ops.paths.pointwise import pointwise
from kernelbank.ops.paths.sdpa import temperature
from kernelbank.ops.paths.toeplitz import unsupported as no_positional_operator
from kernelbank.ops.paths.windows import has_regions
from kernelbank.ops.precision import full_precision
from kernelbank.spec import All, Depthwise, Dynamic, Mean, Support
from kernelbank.spec.inventory import Grid
from kernelbank.spec.pipeline import Pipeline
from kernelbank.spec.support import seen

AHEAD: Mapping[str, frozenset[str]] = {}
"""The device families, words of the device's name such as "H100", on which each path is measured ahead
(docs/gpu.md). None yet."""
CROSSOVER = 7000
"""Positions above which Fourier transforms need less time than products with the table's matrix: counted from the rates
of an H200, not measured (docs/gpu.md)."""

Rows = tuple[float, float, float]
"""g, c and w of `ops.kernels.tiles`."""

# ---- what a pipeline is for a kernel ---------------------------------------------------------------------


def activation(steps: Pipeline, kernels: int, positions: int) -> tuple[str, Rows] | None:
    """`steps` over so many visible kernels and positions as w f(g s + c) with one of the kernels' functions f, or None:
    a pointwise activation, "softmax", "layernorm" or "rmsnorm"."""
    if (x := temperature(steps)) is not None:
        return "softmax", (x, 0.0, 1.0)
    if (plain := affine(steps, kernels, positions)) is not None:
        return "identity", (1.0, plain.shift / plain.gain, plain.gain)
    if (normed := moments(steps, kernels, positions)) is not None:
        name, before, after = normed.normaliser, normed.before, normed.after
        fits = name in ("layernorm", "rmsnorm") and not after.shift
        return (name, (before.gain, before.shift, after.gain)) if fits else None
    curved = pointwise(steps, kernels, positions)
    if curved is None or curved.name not in ("relu", "relu2", "sigmoid", "gelu"):
        return None
    return curved.name, (curved.before.gain, curved.before.shift, curved.gain)


def rows(s: Context, queries: int, kernels: int, device: torch.device) -> Tensor:
    """g, c and w of every query, (3, T) in float32: they depend on the number of kernels that it sees."""
    return cached(_rows, s.spec.activation, s.geo.support, s.geo.grid, s.geo.prefix, queries, kernels, device)


def _rows(
    steps: Pipeline, support: Support, grid: Grid, prefix: int, queries: int, kernels: int, device: torch.device
) -> Tensor:
    counts = [kernels] * queries
    if not isinstance(support, All):
        ys, xs = ([len(region) for region in seen(support, side)] for side in grid)
        counts[prefix:] = [prefix + y * x for y in ys for x in xs]
    by_count = {n: _row(steps, n, queries) for n in set(counts)}
    if len(by_count) == 1:  # written on the device: a compiled graph copies nothing to it
        return torch.stack([torch.full((queries,), x, device=device) for x in by_count[counts[0]]])
    return torch.tensor([by_count[n] for n in counts], dtype=torch.float32, device=device).t().contiguous()


def _row(steps: Pipeline, kernels: int, queries: int) -> Rows:
    known = activation(steps, kernels, queries)
    assert known is not None
    return known[1]


def function(s: Context) -> str | None:
    """The name of f, or None."""
    known = activation(s.spec.activation, 2, 2)
    return None if known is None else known[0]


# ---- what is visible, for a kernel -----------------------------------------------------------------------


def region_numbers(support: Support, grid: Grid, prefix: int, device: torch.device) -> Tensor:
    """The region of each token, (T,) int32; -1 for prefix tokens."""
    of_y, of_x = (_numbered(support, side) for side in grid)
    numbers = [y * (max(of_x) + 1) + x for y in of_y for x in of_x]
    return torch.tensor([-1] * prefix + numbers, dtype=torch.int32, device=device)


def _numbered(support: Support, side: int) -> list[int]:
    regions = seen(support, side)
    order = sorted(set(regions))
    return [order.index(region) for region in regions]


def frames(support: Support, grid: Grid, device: torch.device) -> Tensor:
    """The tokens of each region as cells of a frame as large as the largest region, (R, L) int32, -1 in empty cells."""
    rows_of, columns_of = (sorted(set(seen(support, side))) for side in grid)
    height, width = (max(map(len, axis)) for axis in (rows_of, columns_of))
    table = [
        [ys[y] * grid[1] + xs[x] if y < len(ys) and x < len(xs) else -1 for y in range(height) for x in range(width)]
        for ys, xs in product(rows_of, columns_of)
    ]
    return torch.tensor(table, dtype=torch.int32, device=device)


def frame(support: Support, grid: Grid) -> Grid:
    """The sides of that frame."""
    height, width = (max(map(len, seen(support, side))) for side in grid)
    return height, width


def _entries(p: Params, s: Context) -> tuple[Tensor | None, list[int]]:
    """The flattened table with the entries of the prefix, and the sides (a, b)."""
    if s.geo.sides is None:
        return None, [1, 1]
    table = p["table.weight"]
    entries = table.flatten(1)
    if s.geo.prefix:
        entries = torch.cat([entries, p["table.prefix"]], 1)
    return entries, [table.shape[1] // 2 + 1, table.shape[2] // 2 + 1]


# ---- the paths -------------------------------------------------------------------------------------------


def _operands(q: Tensor, bank: TwoStepBank) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in one dtype, one k and v per image."""
    key, value = (side.expand(q.shape[0], -1, -1, -1).to(q.dtype) for side in (bank.key, bank.value))
    return q, key, value


def attend_pointwise(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """w f(g (scale q k^T + p) + c) v."""
    q, key, value = _operands(q, bank)
    (entries, sides), name, support = _entries(p, s), function(s), s.geo.support
    assert name is not None
    regions = None
    if not isinstance(support, All):
        regions = cached(region_numbers, support, s.geo.grid, s.geo.prefix, q.device)
    numbers = rows(s, q.shape[2], key.shape[2], q.device)
    return pointwise_attention(
        q, key, value, entries, numbers, regions, s.geo.prefix, s.geo.grid[1], sides, name, bank.scale
    )


def attend_moments(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """LayerNorm or RMSNorm over the kernels."""
    q, key, value = _operands(q, bank)
    entries, sides = _entries(p, s)
    numbers = rows(s, q.shape[2], key.shape[2], q.device)
    centred = function(s) == "layernorm"
    return moments_attention(q, key, value, entries, numbers, s.geo.prefix, s.geo.grid[1], sides, centred, bank.scale)[
        0
    ]


def attend_regions(q: Tensor, bank: TwoStepBank, p: Params, s: Context) -> Tensor:
    """Each region alone."""
    q, key, value = _operands(q, bank)
    (entries, sides), name = _entries(p, s), function(s)
    assert name is not None
    members = cached(frames, s.geo.support, s.geo.grid, q.device)
    numbers, side = rows(s, q.shape[2], q.shape[2], q.device), frame(s.geo.support, s.geo.grid)[1]
    return region_attention(q, key, value, entries, numbers, members, side, sides, name, bank.scale)


def depthwise_core(operand_BTC: Tensor, source_BTC: Tensor, p: Params, s: Context) -> Tensor:
    """q mean(k) + sum_j p_ij k_j."""
    with full_precision(source_BTC):
        taps = generate_taps(source_BTC.to(generator_dtype(p, s)), p, s)[0]
    o = depthwise_attention(operand_BTC, taps.to(operand_BTC.dtype), p["table.weight"], *s.geo.grid)[0]
    return o + p["bias"].to(o.dtype) if "bias" in p else o


def toeplitz(x_BNC: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """sum_j p_ij x_j."""
    return depthwise_attention(None, x_BNC, table, *grid)[0]


# ---- what they do not support ----------------------------------------------------------------------------


def needs_gpu(s: Context, call: Call) -> Reason:
    """Why no kernel runs on the device, in the dtype or under the transform of a call."""
    if not available():
        return "Triton is not installed"
    if call.transformed:
        return "it has no rule for transforms of torch.func"
    if call.dtype not in DTYPES:
        return f"it runs in float32, float16 and bfloat16, not {str(call.dtype).removeprefix('torch.')}"
    if call.device != "cuda":
        return None if interpreted() and call.device == "cpu" else f"it runs on CUDA GPUs, not on device {call.device}"
    if torch.version.hip is not None:
        return "its tiles are chosen for CUDA GPUs, not for ROCm"
    found = gpu(s.geo.device).capability
    return f"compute capability {found[0]}.{found[1]} is older than {OLDEST[0]}.{OLDEST[1]}" if found < OLDEST else None


def needs_memory(s: Context, call: Call, width: int, cells: int = 0) -> Reason:
    """Why heads of `width` channels do not fit a program."""
    if width > WIDEST_HEAD:
        return f"heads of {width} channels are wider than {WIDEST_HEAD}"
    if call.device != "cuda":
        return None
    needed = shared_memory(width, half_precision(call), cells)
    most = gpu(s.geo.device).shared_memory
    return f"a tile needs {needed} bytes of shared memory, and the device has {most}" if needed > most else None


def _attention_unsupported(s: Context, call: Call, functions: tuple[str, ...], cells: int = 0) -> Reason:
    """What no attention kernel supports, and functions other than those given."""
    if (reason := first(needs_two_step(s), needs_gpu(s, call), needs_no_dropout(s))) is not None:
        return reason
    if not isinstance(s.spec.bank, Dynamic):
        return "it runs generated kernels, which have no bias"
    if s.mask is not None:
        return "an attn_mask hides kernels"
    if s.geo.sides is not None and s.geo.steps != (1, 1):
        return f"its table counts offsets in steps of 1 x 1, not {s.geo.steps[0]} x {s.geo.steps[1]}"
    if function(s) not in functions:
        return f"its activations are {', '.join(functions)} between affine steps"
    if not isinstance(s.geo.support, All) and any(step.axis == "positions" for step in s.spec.activation):
        return "@positions depends on the kernel where kernels are hidden"
    return needs_memory(s, call, s.dim // s.heads * s.spec.size**2, cells)


POINTWISE = ("identity", "relu", "relu2", "sigmoid", "gelu")
NORMS = ("layernorm", "rmsnorm")


def pointwise_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Other activations, supports that are no regions, wide heads, other devices."""
    if not isinstance(s.geo.support, All) and not has_regions(s.geo.support, s.geo.grid):
        return f"support={s.geo.support} has no regions"
    return _attention_unsupported(s, call, POINTWISE)


def moments_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Activations without such a normaliser, hidden kernels, wide heads, other devices."""
    return first(needs_every_kernel(s), _attention_unsupported(s, call, NORMS))


def regions_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Regions that are large or no rectangles, prefix tokens, other devices."""
    if isinstance(s.geo.support, All) or not has_regions(s.geo.support, s.geo.grid):
        return f"support={s.geo.support} has no regions"
    if s.geo.prefix:
        return "a prefix token belongs to every region"
    axes = [region for side in s.geo.grid for region in seen(s.geo.support, side)]
    if any(region[-1] - region[0] >= len(region) for region in axes):
        return f"the regions of support={s.geo.support} are no rectangles"
    height, width = frame(s.geo.support, s.geo.grid)
    if height * width > MOST_CELLS:
        return f"regions of {height * width} cells have more than {MOST_CELLS}"
    return _attention_unsupported(s, call, (*POINTWISE, "softmax", "layernorm"), height * width)


def depthwise_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Other kernels, hidden kernels, prefix tokens, other devices."""
    if (reason := first(needs_one_step(s), needs_every_kernel(s), needs_gpu(s, call))) is not None:
        return reason
    spec = s.spec
    if not (isinstance(spec.kernel, Depthwise) and isinstance(spec.mix, Mean)) or spec.size > 1 or s.geo.sides is None:
        return "it runs depth-wise kernels of size 1 with mix=mean and position=relative"
    return "a prefix token has entries of its own" if s.geo.prefix else None


def toeplitz_unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """What no positional operator supports, and other devices."""
    return first(no_positional_operator(s, call, m), needs_gpu(s, call))


# ---- where they are preferred ----------------------------------------------------------------------------


def _preferred(name: str, most: float = torch.inf) -> Callable[[Context, Call, Machine], Reason]:
    """The device families on which the path `name` is measured ahead, up to `most` positions."""

    def preferred(s: Context, call: Call, m: Machine) -> Reason:
        if call.device != "cuda" or not AHEAD.get(name) or s.geo.grid[0] * s.geo.grid[1] > most:
            return None
        device = gpu(s.geo.device).name
        family = next((word for word in device.replace("-", " ").split() if word in AHEAD[name]), None)
        return None if family is None else f"measured ahead on {family}"

    return preferred


def _path(
    name: str, run: Callable[[Tensor, Params, Context], Tensor], unsupported: Callable[[Context, Call, Machine], Reason]
) -> MixerPath:
    return MixerPath(name, run, unsupported, _preferred(name))


PATHS = (
    _path("triton_regions", attending(attend_regions), regions_unsupported),
    _path("triton_pointwise", attending(attend_pointwise), pointwise_unsupported),
    _path("triton_moments", attending(attend_moments), moments_unsupported),
    MixerPath(
        "triton_depthwise", framed(depthwise_core), depthwise_unsupported, _preferred("triton_depthwise", CROSSOVER)
    ),
)
POSITION = PositionPath("triton_toeplitz", toeplitz, toeplitz_unsupported, _preferred("triton_toeplitz", CROSSOVER))
