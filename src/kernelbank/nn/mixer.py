"""Mixer: the one module that runs every legal record. Its parameters are a loop over `inventory`, its forward is
`ops.plan.mix`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelbank.nn.transform import Placement, move_all
from kernelbank.ops.context import check_input
from kernelbank.ops.geometry import Geometry, geometry
from kernelbank.ops.plan import mix
from kernelbank.spec import Dynamic, MixerSpec, SpecError, TwoStep
from kernelbank.spec.arguments import TEMPERATURE
from kernelbank.spec.inventory import Grid, check_host, inventory
from kernelbank.spec.inventory import Tensor as Entry


class Tempered(nn.Module):
    """A module whose predicted coefficients have a temperature of their own in training (arXiv 1912.03458)."""

    _temperature: float | None = None

    @property
    def temperature(self) -> float | None:
        """Replaces the tau of a predict record in training. Raises SpecError unless None or finite and > 0."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        if value is not None and not TEMPERATURE.accepts(value):
            raise SpecError(f"temperature={value} is not legal; legal: None, or {TEMPERATURE.expected}")
        self._temperature = value


class Mixer(Tempered):
    """static conv -> dynamic conv(s) -> static conv on tokens (B, T, C), T = prefix + H * W (paper, figure 1).

    `spec` is a record or its text, `grid` = (H, W), `prefix` the tokens before the grid (class, registers).
    `attn_drop` drops entries of the attention map of a two_step record, `proj_drop` the output. With `dynamic_grid`
    what depends on the grid is resampled in a forward on another one. ``temperature``, not in the state dict,
    replaces the tau of a predict record in training when it is set.

    The state dict takes timm's names too: qkv, proj, relative_position_bias_table, and fc1, fc2 for an FFN.

    Raises SpecError for channels that do not divide, an unresolved alternate shift, or dropout that the record has
    no place for.
    """

    def __init__(
        self,
        spec: MixerSpec | str,
        dim: int,
        num_heads: int,
        grid: Grid,
        *,
        prefix: int = 0,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dynamic_grid: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = MixerSpec.parse(spec) if isinstance(spec, str) else spec
        if not isinstance(self.spec, MixerSpec):
            raise SpecError(f"spec={spec!r} is not legal; legal: a MixerSpec or its text")
        self.dim, self.num_heads, self.grid, self.prefix, self.qk_norm = dim, num_heads, grid, prefix, qk_norm
        check_host(dim, num_heads, grid, prefix)
        _check_drop("attn_drop", attn_drop)
        _check_drop("proj_drop", proj_drop)
        if attn_drop and not isinstance(self.spec.kernel, TwoStep):
            raise SpecError(f"attn_drop={attn_drop} is not legal with {self.spec}: only two_step has an attention map")
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.dynamic_grid = dynamic_grid
        self.entries = inventory(self.spec, dim, num_heads, grid, prefix, qk_norm)
        for entry in self.entries:
            self._place(entry, torch.empty(entry.shape, device=device, dtype=dtype))
        geometry(self.spec, grid, prefix)  # refuses an unresolved shift
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(accept_timm_names)  # type: ignore[no-untyped-call]

    def _place(self, entry: Entry, tensor: Tensor) -> None:
        """The tensor under its dotted name, in plain modules for the parts before the dot."""
        *path, leaf = entry.name.split(".")
        home: nn.Module = self
        for part in path:
            if not hasattr(home, part):
                home.add_module(part, nn.Module())
            home = getattr(home, part)
        if entry.buffer:
            home.register_buffer(leaf, tensor)
        else:
            home.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))

    def hold(self, tensors: Mapping[str, Tensor]) -> None:
        """Take `tensors`, one for every inventory entry, as the mixer's own: a Parameter stays the same object, so
        that optimisers go on with it. Raises SpecError for a wrong shape."""
        for entry in self.entries:
            if (shape := tuple(tensors[entry.name].shape)) != entry.shape:
                raise SpecError(f"{entry.name}: shape {shape} is not legal; legal: {entry.shape}")
            self._place(entry, tensors[entry.name])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every parameter as `inventory` says, from torch's generator."""
        tensors = self.tensors()
        for entry in self.entries:
            initialise_tensor(tensors[entry.name], entry)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and statistics by their inventory name, as the modules hold them now: parametrised, pruned and
        tied weights are what they compute to."""
        held: dict[str, Tensor] = {}
        for entry in self.entries:
            home, _, leaf = entry.name.rpartition(".")
            held[entry.name] = getattr(getattr(self, home) if home else self, leaf)
        return held

    def forward(self, x: Tensor, grid: Grid | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). `grid` may differ from the mixer's where no parameter depends on it, or with
        `dynamic_grid`.

        `attn_mask` is boolean, True where a query may see a kernel: (T, T), (B, T, T) or (B, 1, T, T). Raises
        SpecError for shapes that do not fit and masks that the record cannot honour.
        """
        if x.ndim == 3 and x.shape[-1] != self.dim:
            raise SpecError(f"x has shape {tuple(x.shape)}; legal: (B, T, C) with C = {self.dim}")
        here = self.grid if grid is None else grid
        check_input(x, self.spec, here, self.prefix)
        geo, tensors = geometry(self.spec, here, self.prefix, x.device), self.tensors()
        if here != self.grid:
            tensors = self._tensors_on(here, tensors)
        y = mix(
            x, tensors, self.spec, self.num_heads, here, prefix=self.prefix,
            attn_mask=attn_mask, training=self.training, attn_drop=self.attn_drop, temperature=self.temperature,
            geo=geo,
        )  # fmt: skip
        return F.dropout(y, self.proj_drop, self.training)

    @property
    def geometry(self) -> Geometry:
        """The geometry of the mixer's own grid."""
        device = next((t.device for t in self.tensors().values()), torch.device("cpu"))
        return geometry(self.spec, self.grid, self.prefix, device)

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Move to another grid in place: tables and the matrices of `project` become new parameters, resampled and
        rescaled (docs/backbones.md); the rest stays. Raises SpecError for what of them is computed (parametrised)."""
        there = inventory(self.spec, self.dim, self.num_heads, grid, self.prefix, self.qk_norm)
        old = self.tensors()
        before, after = (Placement(self.spec, at, self.prefix) for at in (self.grid, grid))
        moved = {
            name: tensor for name, tensor in move_all(old, there, before, after).items() if tensor is not old[name]
        }
        for name in moved:
            if not isinstance(old[name], nn.Parameter):
                raise SpecError(f"{name} is computed (parametrised or pruned); legal: a plain parameter")
        self.grid, self.entries = grid, there
        for entry in there:
            if entry.name in moved:
                self._place(entry, nn.Parameter(moved[entry.name], old[entry.name].requires_grad))

    def _tensors_on(self, grid: Grid, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` on another grid. Raises SpecError where a shape depends on the grid, without `dynamic_grid`."""
        there = inventory(self.spec, self.dim, self.num_heads, grid, self.prefix, self.qk_norm)
        for mine, theirs in zip(self.entries, there, strict=True):
            if mine.shape != theirs.shape and not self.dynamic_grid:
                raise SpecError(
                    f"grid={grid} is not legal for a mixer built on {self.grid}: {mine.name} has shape {mine.shape}, "
                    f"that grid needs {theirs.shape}; legal: {self.grid}, dynamic_grid=True, or a mixer on the grid"
                )
        before, after = (Placement(self.spec, at, self.prefix) for at in (self.grid, grid))
        return move_all(tensors, there, before, after) if self.dynamic_grid else tensors

    def extra_repr(self) -> str:
        return f"{str(self.spec)!r}, dim={self.dim}, num_heads={self.num_heads}, grid={self.grid}, prefix={self.prefix}"


def _check_drop(name: str, value: float) -> None:
    """Raises SpecError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise SpecError(f"{name}={value} is not legal; legal: 0 <= {name} < 1")


def initialise_tensor(tensor: Tensor, entry: Entry, generator: torch.Generator | None = None) -> None:
    """Fill `tensor` as its inventory entry says."""
    match entry.init:
        case "zeros":
            tensor.zero_()
        case "ones":
            tensor.fill_(1)
        case "uniform":
            tensor.uniform_(-(entry.fan_in**-0.5), entry.fan_in**-0.5, generator=generator)
        case _:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)


def accept_timm_names(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """timm's fused qkv, its proj and fc1, fc2 and its table of offsets, renamed and reshaped in place. What does not
    fit is left under its own name, for load_state_dict to report."""
    assert isinstance(module, Mixer)
    kinds = ("weight", "bias")
    if isinstance(module.spec.bank, Dynamic) and isinstance(module.spec.kernel, TwoStep):
        for kind in kinds:
            fused = state.get(f"{prefix}qkv.{kind}")
            if fused is not None and fused.shape[:1] == (3 * module.dim,):
                parts = state.pop(f"{prefix}qkv.{kind}").chunk(3)
                state |= {
                    f"{prefix}{name}.{kind}": part for name, part in zip(("q", "key", "value"), parts, strict=True)
                }
    shapes = {entry.name: entry.shape for entry in module.entries}
    renames = [(f"proj.{kind}", f"out.{kind}") for kind in kinds]
    if shapes.get("key.weight", ())[:1] == (1,):  # a static bank in one head: keys and values are fc1 and fc2
        renames += [
            (f"{fc}.{kind}", f"{name}.{kind}") for fc, name in (("fc1", "key"), ("fc2", "value")) for kind in kinds
        ]
    table = state.get(f"{prefix}relative_position_bias_table")
    if table is not None and table.ndim == 2 and "table.weight" in shapes:  # (offsets, h), offsets row by row
        state[f"{prefix}relative_position_bias_table"] = table.t()
        renames.append(("relative_position_bias_table", "table.weight"))
        side = math.isqrt(table.shape[0])
        if side**2 == table.shape[0] and table.numel() != math.prod(shapes["table.weight"]):  # of another window
            state[f"{prefix}table.weight"] = state.pop(f"{prefix}relative_position_bias_table").unflatten(
                1, (side, side)
            )
    for theirs, ours in renames:
        tensor, shape = state.get(f"{prefix}{theirs}"), shapes.get(ours)
        if tensor is not None and shape is not None and tensor.numel() == math.prod(shape):
            state[f"{prefix}{ours}"] = state.pop(f"{prefix}{theirs}").reshape(shape)
    state.pop(f"{prefix}relative_position_index", None)
