"""Hardware: how a recipe is computed; it changes rounding and speed, never which images, updates or rates a run has.
Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """How a recipe is computed, in the processes that ``torchrun`` started."""

    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU of this process, if there is one."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes: every one holds all weights, or they share them out."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 by autocast on GPUs that have it, else float32."""
    micro_batch: int | None = None
    """The most images of a forward pass on one process; the recipe's batch is accumulated."""
    sync_batchnorm: bool = True
    """Statistics of BatchNorm over all processes."""
    grad_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    channels_last: bool = False
    """Channels last in memory: for convolutional trunks on GPUs."""
    deterministic: bool = False
    """The same bits every time, where torch has such algorithms; slower."""
