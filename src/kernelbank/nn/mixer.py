"""`Mixer`: the module of every spec. Its parameters are those of `inventory`, its forward is `ops.plan.mix`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from kernelbank.nn.linears import TensorHolder, called_modules, linear_names, named_tensors, new_linear
from kernelbank.nn.state import translate
from kernelbank.nn.tracing import FxLeaf
from kernelbank.nn.transform import Placement, move_all
from kernelbank.ops.geometry import Geometry, geometry
from kernelbank.ops.plan import mix
from kernelbank.spec import MixerSpec, SpecError, TwoStep
from kernelbank.spec.arguments import POSITIVE
from kernelbank.spec.inventory import Grid, check_host, inventory, is_sized
from kernelbank.spec.inventory import Tensor as Entry


class Tempered(FxLeaf):
    """A module whose predicted coefficients have a temperature of their own in training (arXiv 1912.03458)."""

    _temperature: float | None = None

    @property
    def temperature(self) -> float | None:
        """Replaces tau of a predict spec in training. Raises SpecError unless None or finite and > 0."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float | None) -> None:
        if value is not None and not POSITIVE.accepts(value):
            raise SpecError(f"invalid temperature={value}; expected None, or {POSITIVE.expected}")
        self._temperature = value


class Mixer(Tempered):
    """A token mixer: linear layer -> dynamic convolution(s) -> linear layer on tokens (B, T, C), T = prefix + H * W
    (arXiv 2309.10713, figure 1).

    Its linear layers are nn.Linear modules under the names of `inventory` (q, key, value, out, ...). Hooks on them,
    parametrisations, pruning masks and modules put in their place, such as LoRA adapters, take part in the forward. The
    state dict also loads timm's names: qkv, proj, relative_position_bias_table, and fc1 and fc2 for an FFN.

    Args:
        spec: A spec or its text.
        dim: C, the number of channels.
        num_heads: The number of heads.
        grid: (H, W), the positions.
        prefix: The number of tokens before the grid (class token, registers).
        attn_drop: The rate at which entries of the attention map of a two_step spec are dropped.
        proj_drop: The dropout rate of the output.
        dynamic_grid: Resample what depends on the grid in a forward on another one.

    Attributes:
        temperature: Replaces tau of a predict spec in training if it is set. Not in the state dict.

    Raises:
        SpecError: If the channels do not divide into the heads or groups, an alternating shift is unresolved, or
            attn_drop is given for a spec without an attention map.
    """

    def __init__(
        self,
        spec: MixerSpec | str,
        dim: int,
        num_heads: int,
        grid: Grid,
        *,
        prefix: int = 0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dynamic_grid: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = MixerSpec.parse(spec) if isinstance(spec, str) else spec
        if not isinstance(self.spec, MixerSpec):
            raise SpecError(f"invalid spec={spec!r}; expected a MixerSpec or its text")
        self.dim, self.num_heads, self.grid, self.prefix = dim, num_heads, grid, prefix
        check_host(dim, num_heads, grid, prefix)
        _check_drop("attn_drop", attn_drop)
        _check_drop("proj_drop", proj_drop)
        if attn_drop and not isinstance(self.spec.kernel, TwoStep):
            raise SpecError(f"invalid attn_drop={attn_drop} for {self.spec}; expected 0, since only two_step kernels "
                            "have an attention map")  # fmt: skip
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.dynamic_grid = dynamic_grid
        self.entries = inventory(self.spec, dim, num_heads, grid, prefix)
        geometry(self.spec, grid, prefix)  # raises for an unresolved shift
        self.linears = linear_names(self.entries)
        for entry in self.entries:
            self._set(entry, torch.empty(entry.shape, device=device, dtype=dtype))
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(_translate)  # type: ignore[no-untyped-call]

    def _set(self, entry: Entry, tensor: Tensor) -> None:
        """Store the tensor under its dotted name: in an nn.Linear, in a holder, or in the mixer itself."""
        home, _, leaf = entry.name.rpartition(".")
        if home and home not in self._modules:
            self.add_module(home, self._new_module(home))
        holder: nn.Module = getattr(self, home) if home else self
        if entry.buffer:
            holder.register_buffer(leaf, tensor)
        else:
            holder.register_parameter(leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))

    def _new_module(self, name: str) -> nn.Module:
        if name not in self.linears:
            return TensorHolder()
        shapes = {entry.name: entry.shape for entry in self.entries}
        return new_linear(shapes[f"{name}.weight"], f"{name}.bias" in shapes)

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Make `tensors`, one per inventory entry, the mixer's own. A Parameter stays the same object, so that an
        optimiser that has it remains valid. Raises SpecError for a wrong shape."""
        for entry in self.entries:
            if (shape := tuple(tensors[entry.name].shape)) != entry.shape:
                raise SpecError(f"invalid shape {shape} of {entry.name}; expected {entry.shape}")
            self._set(entry, tensors[entry.name])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter as `inventory` states, from torch's generator."""
        tensors = self.tensors()
        for entry in self.entries:
            if entry.name in tensors:
                initialise_tensor(tensors[entry.name], entry)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and statistics by their inventory name, as the modules hold them now: parametrised, pruned and
        tied weights are what they compute to. Tensors that a module in the place of a linear does not have, such as the
        weight of a quantised one, are left out."""
        return named_tensors(self, self.entries)

    def forward(self, x: Tensor, grid: Grid | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Mix x (B, T, C) -> (B, T, C).

        Args:
            grid: (H, W) of x. It may differ from the mixer's where no parameter depends on it, or with `dynamic_grid`.
            attn_mask: The kernels that each query sees, as booleans or as floats 0 and -inf, of shape (T, T), (B, T)
                for key padding, (B, T, T), (B, 1, 1, T) or (B, 1, T, T).

        Raises:
            SpecError: For shapes that do not fit, and masks that the spec does not support.
        """
        return _mixed(self.fx_argument(x), x, grid, attn_mask)

    @property
    def geometry(self) -> Geometry:
        """The geometry of the mixer's own grid."""
        device = next((t.device for t in self.tensors().values()), torch.device("cpu"))
        return geometry(self.spec, self.grid, self.prefix, device)

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Move to another grid in place: tables and the matrices of `project` become new parameters, resampled and
        rescaled (docs/backbones.md), and the rest stays. Raises SpecError if one of them is parametrised or pruned."""
        entries = inventory(self.spec, self.dim, self.num_heads, grid, self.prefix)
        old = named_tensors(self, self.entries, without=self.linears)
        before, after = (Placement(self.spec, side, self.prefix) for side in (self.grid, grid))
        moved = {
            name: tensor for name, tensor in move_all(old, entries, before, after).items() if tensor is not old[name]
        }
        for name in moved:
            if not isinstance(old[name], nn.Parameter):
                raise SpecError(f"invalid {name}, which is parametrised or pruned; expected a plain parameter")
        self.grid, self.entries = grid, entries
        for entry in entries:
            if entry.name in moved:
                self._set(entry, nn.Parameter(moved[entry.name], old[entry.name].requires_grad))

    def tensors_on(self, grid: Grid, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` on another grid. Raises SpecError where a shape depends on the grid, without `dynamic_grid`."""
        entries = inventory(self.spec, self.dim, self.num_heads, grid, self.prefix)
        for own, other in zip(self.entries, entries, strict=True):
            if own.shape != other.shape and not self.dynamic_grid:
                raise SpecError(
                    f"invalid grid={grid} for a mixer built on {self.grid}: {own.name} has shape {own.shape}, and "
                    f"that grid needs {other.shape}; expected {self.grid}, dynamic_grid=True, or a mixer on the grid"
                )
        before, after = (Placement(self.spec, side, self.prefix) for side in (self.grid, grid))
        return move_all(tensors, entries, before, after) if self.dynamic_grid else tensors

    def extra_repr(self) -> str:
        return f"{str(self.spec)!r}, dim={self.dim}, num_heads={self.num_heads}, grid={self.grid}, prefix={self.prefix}"


# A leaf of torch.fx, since values that depend on the shape and device of the tokens must not be traced.
torch.fx.wrap("_mixed")


def _mixed(mixer: Mixer, x: Tensor, grid: Grid | None, attn_mask: Tensor | None) -> Tensor:
    """`Mixer.forward`."""
    if x.ndim == 3 and x.shape[-1] != mixer.dim:
        raise SpecError(f"invalid x of shape {tuple(x.shape)}; expected (B, T, C) with C = {mixer.dim}")
    grid = mixer.grid if grid is None else grid
    modules = called_modules(mixer, mixer.linears)
    tensors = named_tensors(mixer, mixer.entries, modules)
    if is_sized(mixer.spec) and grid != mixer.grid:
        tensors = mixer.tensors_on(grid, tensors)
    y = mix(
        x, tensors, mixer.spec, mixer.num_heads, grid, prefix=mixer.prefix, attn_mask=attn_mask,
        training=mixer.training, attn_drop=mixer.attn_drop, temperature=mixer.temperature, modules=modules,
    )  # fmt: skip
    return F.dropout(y, mixer.proj_drop, mixer.training)


def _check_drop(name: str, value: float) -> None:
    """Raise SpecError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise SpecError(f"invalid {name}={value}; expected 0 <= {name} < 1")


def _translate(module: Mixer, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """The load hook of a mixer, which accepts timm's names and the shapes of earlier versions."""
    translate(state, prefix, module.spec, module.entries)


def initialise_tensor(tensor: Tensor, entry: Entry, generator: torch.Generator | None = None) -> None:
    """Initialise `tensor` as its inventory entry states."""
    match entry.init:
        case "zeros":
            tensor.zero_()
        case "ones":
            tensor.fill_(1)
        case "log_10":
            tensor.fill_(math.log(10))
        case "uniform":
            tensor.uniform_(-(entry.fan_in**-0.5), entry.fan_in**-0.5, generator=generator)
        case _:
            nn.init.trunc_normal_(tensor, std=0.02, generator=generator)
