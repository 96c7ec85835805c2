"""The hardware options of a run. They change rounding and speed, but not the images, updates and rates. Imports no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The options of the processes that ``torchrun`` starts."""

    device: Literal["auto", "cpu"] = "auto"
    """The device. auto is the GPU of this process if there is one, else the CPU."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """With several processes, whether each holds all weights (ddp) or they are sharded (fsdp2)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """The precision. auto is bfloat16 by autocast on GPUs that support it, else float32."""
    micro_batch: int | None = None
    """The largest number of images per forward pass and process. The batch of the recipe is accumulated."""
    sync_batchnorm: bool = True
    """Compute the statistics of BatchNorm over all processes."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    channels_last: bool = False
    """Use the channels-last memory format, for convolutional trunks on GPUs."""
    deterministic: bool = False
    """Use deterministic algorithms of torch, which are slower."""
