"""The kernels that a position sees, the places of tokens on the grid, and the patches of kernels larger than 1."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kernelbank.ops.scope import ForkSafeLock
from kernelbank.ops.transforms import recorded, transformed
from kernelbank.spec import All, Dilated, Dynamic, MixerSpec, Neighborhood, Own, Relative, Support, Window
from kernelbank.spec.inventory import Grid, extent
from kernelbank.spec.support import seen, step_of


@dataclass(frozen=True)
class Geometry:
    """What follows from the spec and the grid alone: the `support` of the kernels, the (padded) `grid` they are applied
    on, `prefix` tokens before it, and the `sides` of the relative table. Its tensors are computed when a path first
    needs them and cached for every mixer of the same geometry. A path without an N x N tensor computes none."""

    support: Support
    grid: Grid
    prefix: int
    sides: Grid | None = None
    unpadded: Grid | None = None
    device: torch.device | None = None

    @property
    def tokens(self) -> int:
        """T = P + H W."""
        return self.prefix + self.grid[0] * self.grid[1]

    @property
    def steps(self) -> Grid:
        """The rows and columns between neighbouring kernels, in which the relative table counts offsets."""
        return step_of(self.support, self.grid[0]), step_of(self.support, self.grid[1])

    @property
    def visible(self) -> Tensor | None:
        """(T, n), or None when every position sees every kernel."""
        if isinstance(self.support, All):
            return None
        return cached(visibility, self.support, self.grid, self.prefix, self.device)

    @property
    def offsets(self) -> Tensor | None:
        """(T, T), the entry of the flattened relative table for each query and kernel; None without a table."""
        if self.sides is None:
            return None
        return cached(relative_offsets, self.sides, self.grid, self.prefix, self.device, None, self.steps)

    @property
    def layout(self) -> Tensor | None:
        """(N'), the source position of each cell of a padded grid (-1 is padding), or None."""
        if self.unpadded is None:
            return None
        return cached(padded_cells, self.support, self.unpadded, self.device)


def geometry(spec: MixerSpec, grid: Grid, prefix: int, device: torch.device | None = None) -> Geometry:
    """The geometry of `spec` on an H x W `grid` after `prefix` tokens. Raises SpecError for an alternating shift."""
    spec.check_resolved()
    support = on_grid(spec.support, grid)
    padded = padded_grid(support, grid)
    return Geometry(
        support if isinstance(spec.bank, Dynamic) and (padded or _hides(support, grid)) else All(),
        grid if padded is None else padded,
        prefix,
        extent(spec, grid) if isinstance(spec.position, Relative) else None,
        None if padded is None else grid,
        device,
    )


def on_grid(support: Support, grid: Grid) -> Support:
    """The support on a grid: mmpretrain shifts neither axis where the shorter side is no longer than the window
    (``ShiftWindowMSA.forward``); by the definition and in timm each axis decides for itself."""
    if isinstance(support, Window) and support.pad == "mmpretrain" and min(grid) <= support.M:
        return replace(support, shift=0)
    return support


def _hides(support: Support, grid: Grid) -> bool:
    """Whether some position does not see some kernel. A window or neighbourhood that fills the grid is `all`."""
    match support:
        case All():
            return False
        case Own():
            return True
        case Window(M=M) | Dilated(M=M) | Neighborhood(M=M):
            return M < max(grid)
        case _:
            return any(len(region) < side for side in grid for region in seen(support, side))


_CACHE: OrderedDict[Hashable, Tensor] = OrderedDict()
_CACHE_BYTES = 256 * 2**20
"""The size of the cache; the least recently used tensors go first."""
_LOCK = ForkSafeLock()


def cached(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return `compute(*arguments)`, from a cache for equal arguments. A graph that is compiled or exported holds the
    tensor as a constant, up to `MOST_EXPORTED` numbers where it is exported; a transform gets a tensor of its own."""
    if torch.compiler.is_dynamo_compiling():
        return cast(Tensor, getattr(_CONSTANTS, _constant_name(compute, *arguments)))
    if torch.compiler.is_exporting():
        with _disable_current_modes():  # else the graph would hold the computation
            tensor = _remembered(compute, *arguments)
        return tensor if tensor.numel() <= MOST_EXPORTED else compute(*arguments)
    if recorded() or transformed():
        return compute(*arguments)
    return _remembered(compute, *arguments)


MOST_EXPORTED = 2**20
"""The numbers of a constant above which an exported graph computes it, to keep the file small."""


def _remembered(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """The tensor from the cache, computed if it is new."""
    key = (compute, *arguments)
    with _LOCK:
        if key in _CACHE:
            _CACHE.move_to_end(key)
            return _CACHE[key]
    with torch.inference_mode(False):
        tensor = compute(*arguments)
    if type(tensor) in (Tensor, nn.Parameter):  # fake and other tensor subclasses belong to a mode
        with _LOCK:
            _CACHE[key] = tensor
            while len(_CACHE) > 1 and sum(t.numel() * t.element_size() for t in _CACHE.values()) > _CACHE_BYTES:
                _CACHE.popitem(last=False)
    return tensor


class _Constants:
    """The tensors that compiled graphs read, one attribute each, for as long as the process lives."""


_CONSTANTS = _Constants()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_name(compute: Callable[..., Tensor], *arguments: Any) -> str:
    """The attribute of `_CONSTANTS` that holds the tensor, put there if it is new."""
    # Not the tensor itself: torch.compile (2.14) names what this function returns after the function, and fails on two
    # tensors of one name. A parameter, since the shapes of other tensors may be taken as dynamic.
    key = (compute, *arguments)
    with _LOCK:
        name = _CONSTANT_NAMES.setdefault(key, f"constant_{len(_CONSTANT_NAMES)}")
    if not hasattr(_CONSTANTS, name):
        setattr(_CONSTANTS, name, nn.Parameter(_remembered(compute, *arguments), requires_grad=False))
    return name


_CONSTANT_NAMES: dict[Hashable, str] = {}


# ---- visibility ------------------------------------------------------------------------------------------


def visibility(support: Support, grid: Grid, prefix: int, device: torch.device | None = None) -> Tensor:
    """V (T, T), V[i, j] whether query i sees kernel j; prefix tokens come first, see all and are seen by all,
    except that under `self` every token sees only itself."""
    tokens = prefix + grid[0] * grid[1]
    if isinstance(support, Own):
        return torch.eye(tokens, dtype=torch.bool, device=device)
    rows = axis_visibility(support, grid[0], device)
    columns = axis_visibility(support, grid[1], device)
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    on_grid = rows[:, None, :, None] & columns[None, :, None, :]  # (H, W, H, W)
    visible[prefix:, prefix:] = on_grid.reshape(tokens - prefix, tokens - prefix)
    return visible


def axis_visibility(support: Support, length: int, device: torch.device | None) -> Tensor:
    """(length, length): whether a coordinate sees another along one axis."""
    rows = [[at in region for at in range(length)] for region in seen(support, length)]
    return torch.tensor(rows, dtype=torch.bool, device=device).view(length, length)


def padded_grid(support: Support, grid: Grid) -> Grid | None:
    """The grid of whole windows that a published padding works on, or None: the grid as it is."""
    if not isinstance(support, Window) or support.pad == "masked":
        return None
    height, width = (-(-length // min(support.M, length)) * min(support.M, length) for length in grid)
    return height, width


def padded_cells(support: Window, grid: Grid, device: torch.device | None = None) -> Tensor:
    """The source position of each cell of the padded grid (-1: padding).

    ``mmpretrain`` pads bottom and right to whole windows; ``timm`` rolls by the shift first, then pads. Pads carry
    zeros into the linear layers and are kernels like any other.
    """
    axes = [_padded_axis(support, length, device) for length in grid]
    rows, columns = (torch.where(axis < length, axis, -1) for axis, length in zip(axes, grid, strict=True))
    cells = torch.where((rows[:, None] < 0) | (columns[None, :] < 0), -1, rows[:, None] * grid[1] + columns[None, :])
    return cells.flatten()


def unpadded_cells(support: Window, grid: Grid, prefix: int, device: torch.device | None = None) -> Tensor:
    """The tokens on the padded grid that hold the positions of `grid`, in their order."""
    cells = padded_cells(support, grid, device)
    return cells.argsort(stable=True)[len(cells) - math.prod(grid) :] + prefix


def _padded_axis(window: Window, length: int, device: torch.device | None) -> Tensor:
    """Source coordinates along one axis, padded to whole windows; a coordinate >= length is padding."""
    side = min(window.M, length)
    padded = -(-length // side) * side
    at = torch.arange(padded, device=device)
    if window.pad == "mmpretrain" or length <= window.M:
        return at
    return torch.where(at < length, (at + window.resolved_shift) % length, at)


def pad_tokens(x_BTC: Tensor, geo: Geometry) -> Tensor:
    """Return the tokens on the padded grid, with zeros in the padding; without a padded grid, x itself."""
    if geo.layout is None:
        return x_BTC
    cells = F.pad(x_BTC[:, geo.prefix :], (0, 0, 0, 1))[:, geo.layout]
    return torch.cat([x_BTC[:, : geo.prefix], cells], 1)


def crop(y_BTC: Tensor, geo: Geometry) -> Tensor:
    """The inverse of `pad_tokens`: the tokens in their order, without the padding."""
    if geo.unpadded is None:
        return y_BTC
    back = cached(unpadded_cells, geo.support, geo.unpadded, geo.prefix, geo.device)
    return torch.cat([y_BTC[:, : geo.prefix], y_BTC[:, back]], 1)


# ---- position --------------------------------------------------------------------------------------------


def relative_offsets(
    sides: Grid,
    grid: Grid,
    prefix: int,
    device: torch.device | None = None,
    queries: Tensor | None = None,
    steps: Grid = (1, 1),
) -> Tensor:
    """(T, T), or one row for each of `queries`: entries of the flattened relative table, offset i - j on the grid in
    `steps`, then three entries for the prefix (prefix to grid, grid to prefix, prefix to prefix). Offsets beyond the
    table, and those between steps, are any: V hides them."""
    (a, b), (height, width), (down, along) = sides, grid, steps
    at = torch.arange(prefix + height * width, device=device) if queries is None else queries
    cells = torch.arange(height * width, device=device)
    query = (at - prefix).clamp(min=0)[:, None]
    dy = (query // width // down - cells // width // down).clamp(1 - a, a - 1) + a - 1
    dx = (query % width // along - cells % width // along).clamp(1 - b, b - 1) + b - 1
    entries = (2 * a - 1) * (2 * b - 1)
    on_grid = at[:, None] >= prefix
    index = torch.where(on_grid, dy * (2 * b - 1) + dx, entries)
    return torch.cat([torch.where(on_grid, entries + 1, entries + 2).expand(-1, prefix), index], 1)


Offsets = tuple[tuple[int, ...], tuple[int, ...]]
"""Of the rows and columns of a region from its first row and column."""


def region_offsets(sides: Grid, offsets: Offsets, prefix: int, device: torch.device | None = None) -> Tensor:
    """As `relative_offsets` for a region whose rows and columns need not be neighbours, (P + n, P + n)."""
    rows, columns = (torch.tensor(axis, device=device) for axis in offsets)
    box = offsets[0][-1] + 1, offsets[1][-1] + 1
    cells = prefix + (rows[:, None] * box[1] + columns).flatten()
    tokens = torch.cat([torch.arange(prefix, device=device), cells])
    return relative_offsets(sides, box, prefix, device, tokens)[:, tokens]


# ---- the grid --------------------------------------------------------------------------------------------


def to_grid(x_BTC: Tensor, geo: Geometry) -> Tensor:
    """The grid tokens as a map (B, C, H, W)."""
    B, _, C = x_BTC.shape
    return x_BTC[:, geo.prefix :].transpose(1, 2).reshape(B, C, *geo.grid)


def from_grid(prefix_BPC: Tensor, map_BCHW: Tensor) -> Tensor:
    """Tokens (B, T, C) from the prefix and a map."""
    return torch.cat([prefix_BPC, map_BCHW.flatten(2).transpose(1, 2)], 1)


def unfold(x_BTC: Tensor, size: int, geo: Geometry) -> Tensor:
    """The size x size patch of every token, (B, T, C, t): zeros outside the grid; a prefix token is its own
    1 x 1 grid and fills the centre tap only."""
    if size == 1:
        return x_BTC[..., None]
    B, _, C = x_BTC.shape
    patches = F.unfold(to_grid(x_BTC, geo), size, padding=size // 2)  # (B, C*t, N)
    patches = patches.view(B, C, size * size, math.prod(geo.grid)).permute(0, 3, 1, 2)
    centre = F.pad(x_BTC[:, : geo.prefix, :, None], (size * size // 2, size * size // 2))
    return torch.cat([centre, patches], 1)


def pool_cells(x_BTC: Tensor, stride: int, geo: Geometry) -> Tensor:
    """The features that generate the bank, (B, n, C): cells (y//s, x//s) of the grid, a partial cell averages its
    own positions; prefix tokens are not pooled."""
    if stride == 1:
        return x_BTC
    cells = F.avg_pool2d(to_grid(x_BTC, geo), stride, ceil_mode=True, count_include_pad=False)
    return from_grid(x_BTC[:, : geo.prefix], cells)
