"""The positional operator y_i = sum_j p_(i-j) x_j on the grid, one table per head: a product with a Toeplitz matrix.

There are four ways. `dense` forms the N x N matrix. `hybrid` takes the discrete Fourier transform along y and
multiplies by a W x W matrix per frequency along x: H^2 W^2 becomes about H W^2; `hybrid_fft` does so with fast
transforms. `fourier` transforms both axes. The last three hold no N x N tensor, and run in float32 where x is in half
precision or autocast is on."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.ops.context import Call, Context
from kernelbank.ops.expansion import LARGEST, expanded
from kernelbank.ops.geometry import cached, relative_offsets
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.closed_form import affine, moments
from kernelbank.ops.paths.path import (
    Positional,
    PositionPath,
    Reason,
    caches_expansions,
    half_precision,
    needs_every_kernel,
)
from kernelbank.ops.precision import full_precision, wide
from kernelbank.ops.transforms import recorded, transformed
from kernelbank.spec import TwoStep
from kernelbank.spec.inventory import Grid


def dense(x_BNC: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """Products with the matrix of each head: one for all images where gradients are wanted, whose sum over the images
    is then part of a product, and in half precision; else one per image, which needs no copy of x."""
    matrix = expanded((table,), ("dense", grid, x_BNC.dtype), lambda: _dense_matrix(table, grid).to(x_BNC.dtype))
    return multiply(matrix, x_BNC)


def multiply(matrix: Tensor, x_BNC: Tensor) -> Tensor:
    """sum_j m_ij x_j with a matrix (h, N, N), head by head, (B, N, C)."""
    (B, N, C), h = x_BNC.shape, matrix.shape[0]
    if not torch.is_grad_enabled() and x_BNC.dtype == wide(x_BNC.dtype):
        return _by_head(x_BNC, h, lambda x_BNd, head: torch.bmm(matrix[head].expand(B, N, N), x_BNd))
    columns = x_BNC.view(B, N, h, C // h).permute(2, 1, 0, 3).reshape(h, N, -1)
    return torch.bmm(matrix, columns).view(h, N, B, C // h).permute(2, 1, 0, 3).reshape(B, N, C)


def _dense_matrix(table: Tensor, grid: Grid) -> Tensor:
    """(h, N, N)."""
    N = grid[0] * grid[1]
    offsets = cached(relative_offsets, grid, grid, 0, table.device)
    return _centre(table, grid).flatten(1).index_select(1, offsets.flatten()).view(-1, N, N)


def _by_head(x_BNC: Tensor, heads: int, one: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`one`(x (B, N, d), head) for every head, put together. One head at a time stays in the cache."""
    parts = x_BNC.unflatten(2, (heads, -1)).unbind(2)
    if torch.is_grad_enabled() or recorded() or transformed():  # nothing is written in place
        return torch.stack([one(part, head) for head, part in enumerate(parts)], 2).flatten(2).to(x_BNC.dtype)
    o = torch.empty_like(x_BNC, memory_format=torch.contiguous_format)
    for head, (part, place) in enumerate(zip(parts, o.unflatten(2, (heads, -1)).unbind(2), strict=True)):
        place.copy_(one(part, head))
    return o


def _transforms(form: Positional) -> Positional:
    """`form` without autocast, and without a transform of an empty batch, which FFT libraries do not accept."""

    @wraps(form)
    def run(x_BNC: Tensor, table: Tensor, grid: Grid) -> Tensor:
        if x_BNC.shape[0] == 0:
            return x_BNC * table.sum()  # keeps the graph
        with full_precision(x_BNC):
            return form(x_BNC, table, grid)

    return run


@_transforms
def hybrid(x_BNC: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """x along y in the frequency domain, where the operator is one complex W x W product per frequency along x, as
    real ones: (a + ib)(x + iy) as [[a, -b], [b, a]] (x, y).

    The transforms are products with DFT matrices of length 2H - 1, which is all that a correlation over H needs: at
    these lengths they are faster than FFTs, and they leave every frequency in the place where its product reads it.
    """
    (B, N, C), h, (H, W) = x_BNC.shape, table.shape[0], grid
    d = C // h
    spectrum = expanded((table,), ("hybrid", grid), lambda: _hybrid_spectrum(_wide(table), grid))  # (h, F, 2W, 2W)
    forward, inverse = (cached(f, H, spectrum.dtype, x_BNC.device) for f in (to_frequencies, from_frequencies))

    def one(x_BNd: Tensor, head: int) -> Tensor:
        lines = _wide(x_BNd).view(B, H, W, d).permute(1, 2, 0, 3).reshape(H, W * B * d)
        mixed = torch.bmm(spectrum[head], torch.mm(forward, lines).view(H, 2 * W, B * d))
        y = torch.mm(inverse, mixed.view(2 * H, W * B * d))
        return y.view(H, W, B, d).permute(2, 0, 1, 3).reshape(B, N, d)

    return _by_head(x_BNC, h, one)


def _hybrid_spectrum(table: Tensor, grid: Grid) -> Tensor:
    """(h, F, 2W, 2W): the spectrum along y of the W x W Toeplitz matrix that every dy has, as real matrices."""
    H, W = grid
    lines = _centre(table, grid).roll(1 - H, 1)  # dy = 0 first, negative dy at the end
    spectra = torch.matmul(cached(dft, H, table.dtype, table.device, 2 * H - 1)[:, None], lines)  # (2, h, F, 2W-1)
    real, imaginary = spectra.flip(3).unfold(3, W, 1).flip(3)  # h, F, W, W
    return torch.cat([torch.cat([real, -imaginary], 3), torch.cat([imaginary, real], 3)], 2)


def dft(side: int, dtype: torch.dtype, device: torch.device | None = None, points: int | None = None) -> Tensor:
    """(2, F, points): cos and -sin of 2 pi f y / (2 side - 1), the F = side frequencies of a real signal."""
    f, y = (torch.arange(n, dtype=torch.float64, device=device) for n in (side, points or side))
    angle = 2 * torch.pi * f[:, None] * y / (2 * side - 1)
    return torch.stack([angle.cos(), -angle.sin()]).to(dtype)


def to_frequencies(side: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """(F 2, side): real and imaginary part of every frequency of `side` points."""
    return dft(side, dtype, device).transpose(0, 1).flatten(0, 1)


def from_frequencies(side: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """(side, F 2): the inverse of `to_frequencies`; every frequency but 0 counts twice."""
    twice = torch.full((side,), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1
    inverse = dft(side, torch.float64, device) * (twice / (2 * side - 1))[:, None]
    return inverse.permute(2, 1, 0).flatten(1).to(dtype)


@_transforms
def hybrid_fft(x_BNC: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """As `hybrid`, with fast transforms along y: for long sides."""
    (B, N, C), h, (H, W) = x_BNC.shape, table.shape[0], grid
    length, d = smooth(2 * H - 1), C // h
    spectrum = expanded((table,), ("hybrid_fft", grid), lambda: _fft_spectrum(_wide(table), grid))

    def one(x_BNd: Tensor, head: int) -> Tensor:
        lines = _wide(x_BNd).view(B, H, W, d).permute(2, 0, 3, 1).contiguous()  # W B d H: y lies innermost
        lines = torch.fft.rfft(lines, n=length).permute(3, 0, 1, 2).reshape(-1, W, B * d)
        mixed = torch.bmm(spectrum[head].to(lines.dtype), lines)  # F, W, B d
        y = torch.fft.irfft(mixed.permute(1, 2, 0), n=length)[..., :H]
        return y.view(W, B, d, H).permute(1, 3, 0, 2).reshape(B, N, d)

    return _by_head(x_BNC, h, one)


def _fft_spectrum(table: Tensor, grid: Grid) -> Tensor:
    """(h, F, W, W) complex: the spectrum along y of the W x W Toeplitz matrix that every dy has."""
    (H, W), length = grid, smooth(2 * grid[0] - 1)
    rows = _centre(table, grid).flip(2).unfold(2, W, 1).flip(2)  # (h, 2H-1, W, W): [dy, ix, jx] = table[dy, ix - jx]
    rows = F.pad(rows, (0, 0, 0, 0, 0, length - (2 * H - 1))).roll(1 - H, 1)
    return torch.fft.rfft(rows, dim=1).contiguous()


@_transforms
def fourier(x_BNC: Tensor, table: Tensor, grid: Grid) -> Tensor:
    """A zero-padded correlation by the convolution theorem."""
    (B, N, C), h, (H, W) = x_BNC.shape, table.shape[0], grid
    lengths = smooth(2 * H - 1), smooth(2 * W - 1)
    spectrum = expanded((table,), ("fourier", grid), lambda: _fourier_spectrum(_wide(table), grid))

    def one(x_BNd: Tensor, head: int) -> Tensor:
        maps = torch.fft.rfft2(_wide(x_BNd).view(B, H, W, C // h).permute(0, 3, 1, 2), s=lengths)
        y = torch.fft.irfft2(maps * spectrum[head].to(maps.dtype), s=lengths)[..., :H, :W]
        return y.permute(0, 2, 3, 1).reshape(B, N, C // h)

    return _by_head(x_BNC, h, one)


def _fourier_spectrum(table: Tensor, grid: Grid) -> Tensor:
    """(h, Fy, Fx) complex, the table's zero offset at the origin."""
    (H, W), (rows, columns) = grid, (smooth(2 * side - 1) for side in grid)
    padded = F.pad(_centre(table, grid), (0, columns - (2 * W - 1), 0, rows - (2 * H - 1)))
    return torch.fft.rfft2(padded.roll((1 - H, 1 - W), (1, 2)))


def strips(table: Tensor, grid: Grid) -> Tensor:
    """(h, W, (2H-1) W): every W x W block of the N x N matrix once. The rows of the matrix at grid row iy are the view
    [:, :, (H-1-iy) W : (2H-1-iy) W], so that no matrix is needed."""
    rows = _centre(table, grid).flip(1, 2).unfold(2, grid[1], 1).flip(2)  # (h, 2H-1, W, W): [H-1-dy, ix, jx]
    return rows.permute(0, 2, 1, 3).flatten(2).contiguous()


def row_moments(table: Tensor, prefix: Tensor | None, grid: Grid, count: int) -> tuple[Tensor, Tensor]:
    """(sum_j p_ij^2, sum_j (p_ij - mean_j p_ij)^2), each (h, T), without the matrix: sums over the H x W part of the
    table that a position sees, from its integral image in float64. `prefix` (h, 3) are the entries of `count` prefix
    tokens, which come first."""
    (H, W), entries = grid, _centre(table, grid).double()
    edge = None if prefix is None else prefix.double()
    n, centre = H * W + count, entries.mean((1, 2), keepdim=True).detach()

    def sums(values: Tensor, at_edge: Tensor | None) -> Tensor:
        """sum_j of one function of p_ij, (h, T)."""
        area = F.pad(values.cumsum(1).cumsum(2), (1, 0, 1, 0))
        grid_sums = (area[:, H:, W:] - area[:, :H, W:] - area[:, H:, :W] + area[:, :H, :W]).flatten(1)
        if at_edge is None or not count:
            return grid_sums
        down, up, across = at_edge.unbind(1)
        first = (H * W * down + count * across)[:, None].expand(-1, count)
        return torch.cat([first, grid_sums + count * up[:, None]], 1)

    shifted, edge_shifted = entries - centre, None if edge is None else edge - centre[:, :, 0]
    squares = sums(entries**2, None if edge is None else edge**2)
    about = sums(shifted**2, None if edge_shifted is None else edge_shifted**2)
    spread = about - sums(shifted, edge_shifted) ** 2 / n
    return squares.to(table.dtype), spread.clamp(min=0).to(table.dtype)


def _centre(table: Tensor, grid: Grid) -> Tensor:
    """The (2H-1) x (2W-1) middle of a table that may be larger."""
    (a, b), (H, W) = ((side + 1) // 2 for side in table.shape[1:]), grid
    return table[:, a - H : a + H - 1, b - W : b + W - 1]


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def smooth(least: int) -> int:
    """The least number >= `least` without a prime factor above 5: a length for which FFTs are fast."""
    length = least
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


DENSE, DENSE_TRAINED, DENSE_HALF = 300, 400, 1600
"""Positions up to which the N x N matrix of a table is the fastest: in float32, with gradients, and in half precision
(docs/performance.md)."""
TRANSFORMED = 72
"""The side up to which computing the spectrum of `hybrid` at every call is worth it."""


def unsupported(s: Context, call: Call, m: Machine) -> Reason:
    """Not supported: specs whose output is not linear in the table, hidden kernels."""
    if s.geo.sides is None:
        return "the spec has no relative position"
    if (reason := needs_every_kernel(s)) is not None:
        return reason
    nonlinear = isinstance(s.spec.kernel, TwoStep) and not (
        affine(s.spec.activation, 2, 2) or moments(s.spec.activation, 2, 2)
    )
    return "the table is added to scores that go through a non-linearity" if nonlinear else None


def dense_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred for few positions."""
    positions = s.geo.grid[0] * s.geo.grid[1]
    most = DENSE_HALF if half_precision(call) else DENSE_TRAINED if call.grad else DENSE
    return f"{positions} positions (up to {most}) make a matrix that is fast" if positions <= most else None


def hybrid_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred for spectra that are cached, or small enough to be computed in every call."""
    H, W = s.geo.grid
    suits = s.num_heads * H * 4 * W * W * 4 <= LARGEST if caches_expansions(call) else max(H, W) <= TRANSFORMED
    if not suits:
        return None
    return f"{H * W} positions: {H} frequencies of {2 * W} x {2 * W} products, transforms as products"


def hybrid_fft_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred for cached spectra, which have half the size of those of `hybrid`."""
    (H, W), h = s.geo.grid, s.num_heads
    suits = caches_expansions(call) and h * (smooth(2 * H - 1) // 2 + 1) * W * W * 8 <= LARGEST
    return f"{H * W} positions: about {H} frequencies of {W} x {W} products" if suits else None


def fourier_preferred(s: Context, call: Call, m: Machine) -> Reason:
    """Preferred if no other path is."""
    return f"{s.geo.grid[0]} x {s.geo.grid[1]} positions: two transforms, no product of W x W"


PATHS = (
    PositionPath("dense", dense, unsupported, dense_preferred),
    PositionPath("hybrid", hybrid, unsupported, hybrid_preferred),
    PositionPath("hybrid_fft", hybrid_fft, unsupported, hybrid_fft_preferred),
    PositionPath("fourier", fourier, unsupported, fourier_preferred),
)
