"""What the attention kernels share: a tile of scores with its relative position, what is visible in it, the activations
and their derivatives.

A score is s_ij = g_i (scale q_i . k_j + p_ij) + c_i and the output o_i = w_i sum_j f(s_ij) v_j; the rows g, c and w
hold what an activation pipeline does before and after its non-linearity f. A factor that makes f(s) larger than half
precision holds stands in g (`ops.paths.pointwise`), and w is applied to the sum in float32.
"""

from __future__ import annotations

from kernelbank.ops.kernels.launch import jit, tl


@jit
def load_rows(base, rows, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of a matrix of WIDTH columns, zero where not `inside` and in the columns up to BLOCK."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + rows[:, None] * stride + column[None, :], mask=mask, other=0.0)


@jit
def store_rows(
    base,
    rows,
    stride,
    inside,
    values,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write `values` to the rows `inside` of a matrix of WIDTH columns."""
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column < WIDTH)[None, :]
    tl.store(base + rows[:, None] * stride + column[None, :], values.to(base.dtype.element_ty), mask=mask)


@jit
def place(token, prefix, width, span):
    """y span + x of a token on the grid, so that the entry of a relative table for i and j is a difference of two."""
    cell = token - prefix
    return (cell // width) * span + cell % width


@jit
def seen(inside, region_i, region_j, REGIONS: tl.constexpr):
    """Which kernels of a tile are visible: those of the query's region; a prefix token has region -1, sees all and is
    seen by all."""
    if REGIONS:
        same = region_i[:, None] == region_j[None, :]
        return inside & (same | (region_i < 0)[:, None] | (region_j < 0)[None, :])
    else:
        return inside


@jit
def positions(
    entries, visible, i, j, at_i, at_j, prefix, centre, count,
    PREFIX: tl.constexpr,
):  # fmt: skip
    """p_ij of a tile, read from the table: `centre` is the entry of offset zero, and the three after the first `count`
    are prefix to grid, grid to prefix, and prefix to prefix."""
    index = at_i[:, None] - at_j[None, :] + centre
    if PREFIX:
        on_grid = tl.where((j < prefix)[None, :], count + 1, index)
        index = tl.where((i < prefix)[:, None], tl.where((j < prefix)[None, :], count + 2, count), on_grid)
    return tl.load(entries + index, mask=visible, other=0.0).to(tl.float32)


@jit
def activate(s, ACT: tl.constexpr):
    """f(s). NaN stays NaN."""
    if ACT == "relu":
        return tl.where(s < 0, 0.0, s)
    elif ACT == "relu2":
        r = tl.where(s < 0, 0.0, s)
        return r * r
    elif ACT == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-s))
    elif ACT == "gelu":
        return 0.5 * s * (1.0 + tl.math.erf(s * 0.7071067811865476))
    else:
        return s


@jit
def slope(s, ACT: tl.constexpr):
    """f'(s)."""
    if ACT == "relu":
        return tl.where(s > 0, 1.0, 0.0)
    elif ACT == "relu2":
        return tl.where(s > 0, 2.0 * s, 0.0)
    elif ACT == "sigmoid":
        a = 1.0 / (1.0 + tl.exp(-s))
        return a * (1.0 - a)
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * s * s)
        return 0.5 * (1.0 + tl.math.erf(s * 0.7071067811865476)) + s * density
    else:
        return tl.full(s.shape, 1.0, tl.float32)


@jit
def load_statistics(stats, at, inside, total, like, ACT: tl.constexpr):
    """mu, 1 / sigma and the two means of `differentiate` for some queries; of ACT "moments" only."""
    if ACT == "moments":
        mean = tl.load(stats + at, mask=inside, other=0.0)
        inverse = tl.load(stats + total + at, mask=inside, other=0.0)
        first = tl.load(stats + 2 * total + at, mask=inside, other=0.0)
        second = tl.load(stats + 3 * total + at, mask=inside, other=0.0)
        return mean, inverse, first, second
    else:
        return like, like, like, like


@jit
def differentiate(
    s, d_a, visible, gain, weight, mean, inverse, first, second,
    ACT: tl.constexpr,
):  # fmt: skip
    """(w f(s), the gradient of scale q k^T + p) from d_a = dO v^T.

    Of "moments", f(s) = y = (s - mu) / sigma, whose gradient is (w d_a - mean_j w d_a - y mean_j(w d_a y)) / sigma;
    both means follow from dO, the mean of v and the output, so that a tile needs no other.
    """
    if ACT == "moments":
        y = (s - mean[:, None]) * inverse[:, None]
        a = y * weight[:, None]
        d_s = inverse[:, None] * (weight[:, None] * d_a - first[:, None] - y * second[:, None])
    else:
        a = activate(s, ACT) * weight[:, None]
        d_s = d_a * weight[:, None] * slope(s, ACT)
    return tl.where(visible, a, 0.0), tl.where(visible, d_s * gain[:, None], 0.0)
