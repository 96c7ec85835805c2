"""The inputs that an exported file takes, the forms of attention in it, and the models that have neither."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.exports.runtimes import BATCH, INPUT
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.plan import use_path
from kernelbank.spec import All, MixerSpec, Own, Relative
from kernelbank.spec.inventory import Grid, is_sized

Form = Literal["products", "conv"]
"""How mixers are written: attention by matrix products, or as grouped convolutions."""
ANY_BATCH = (1, 3)
"""The batches that are compared where a file takes any. The traced one has 2."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of a file: `batch` images, or any number for None, of `channels` and `size` (height, width), or of
    other multiples of `multiple` pixels with `dynamic_size`."""

    channels: int
    size: Grid
    batch: int | None = None
    dynamic_size: bool = False
    multiple: int = 1

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches that are compared."""
        return ANY_BATCH if self.batch is None else (self.batch,)

    @property
    def sizes(self) -> tuple[Grid, ...]:
        """The image sizes that are compared: none but `size`, or two larger ones besides."""
        if not self.dynamic_size:
            return (self.size,)
        (height, width), step = self.size, self.multiple
        return self.size, (height, width + 2 * step), (height + 3 * step, width + step)

    def traced(self) -> Tensor:
        """The images that are traced, of another batch and size than those that are compared where they may differ."""
        (height, width), step = self.size, self.multiple if self.dynamic_size else 0
        return images(2 if self.batch is None else self.batch, self.channels, (height + step, width + 2 * step), 0)

    def compared(self) -> Iterator[Tensor]:
        """Images of every batch and size that is compared, two draws of a fixed batch."""
        batches = self.batches if self.batch is None else self.batches * 2
        for seed, (batch, size) in enumerate(product(batches, self.sizes), 1):
            yield images(batch, self.channels, size, seed)

    def axes(self) -> dict[str, dict[int, Any]] | None:
        """The dynamic axes for torch.export."""
        axes: dict[int, Any] = {} if self.batch is not None else {0: torch.export.Dim(BATCH)}
        if self.dynamic_size:
            axes |= {
                axis: self.multiple * torch.export.Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))
            }
        return {INPUT: axes}

    def __str__(self) -> str:
        batch = "any batch" if self.batch is None else f"a batch of {self.batch}"
        return f"{batch}, any size in multiples of {self.multiple}" if self.dynamic_size else batch


def images(batch: int, channels: int, size: Grid, seed: int) -> Tensor:
    """Random images (B, C, H, W), normal as normalised ones are about."""
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def multiple_of(model: nn.Module) -> int:
    """The number of pixels whose multiples the sides of images are: those of a position of the last stage."""
    info: Any = getattr(model, "feature_info", None)
    return 1 if not info else int(info[-1]["reduction"])


# ---- forms -----------------------------------------------------------------------------------------------


def traced_form(form: Form) -> AbstractContextManager[None]:
    """The paths that are traced for a form."""
    return use_path("conv") if form == "conv" else nullcontext()


def check_inputs(model: nn.Module, form: Form, batch: int | None, dynamic_size: bool) -> None:
    """Raise InputError for a form or inputs that a file of the model cannot have."""
    if form not in ("products", "conv"):
        raise InputError(f"invalid form={form!r}; expected products or conv")
    if batch is not None and batch < 1:
        raise InputError(f"invalid batch={batch}; expected a whole number >= 1")
    if form == "conv":
        _check_conv(model, batch, dynamic_size)
    if dynamic_size:
        _check_dynamic(model)


def _check_conv(model: nn.Module, batch: int | None, dynamic_size: bool) -> None:
    if batch is None:
        raise InputError("invalid form=conv for batches of any size: images are groups of a convolution, and their "
                         "number is a constant of the graph; expected a fixed batch, such as batch=1")  # fmt: skip
    if dynamic_size:
        raise InputError("invalid form=conv with dynamic_size: tokens are the kernels of a convolution, and their "
                         "number is a constant of the graph; expected images of one size")  # fmt: skip
    if not any(isinstance(module, Mixer) for module in model.modules()):
        raise InputError("invalid form=conv for a model without mixers of this library; expected products")


def _check_dynamic(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, Mixer) and (reason := _one_size(module.spec)) is not None:
            raise InputError(f"invalid dynamic_size: {path}, {module.spec}, {reason}; expected images of one size")
        if getattr(module, "strict_img_size", False):
            raise InputError(f"invalid dynamic_size: {path} takes images of one size; expected a model that was "
                             "built with dynamic_img_size=True")  # fmt: skip


def _one_size(spec: MixerSpec) -> str | None:
    """Why a graph with `spec` takes images of one size."""
    if is_sized(spec):
        what = "a relative table" if isinstance(spec.position, Relative) else "the matrices of project"
        return f"has {what}, whose shape depends on the size and would be resampled by the graph"
    if not isinstance(spec.support, All | Own):
        return f"has support={spec.support}, whose order of tokens and masks are constants of one size"
    return None
