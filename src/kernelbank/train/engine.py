"""The engine of a run: one process, several (DDP), or several with sharded weights (FSDP2), on HF Accelerate."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kernelbank.data.order import Part
from kernelbank.errors import InputError
from kernelbank.ops.statistics import synchronised
from kernelbank.records import GpuSettings
from kernelbank.train.hardware import Hardware


class Engine:
    """The process group, the device and the precision of a run, and communication between its processes."""

    def __init__(
        self, hardware: Hardware | None = None, trackers: Sequence[str] = (), folder: Path | None = None
    ) -> None:
        self.hardware = hardware or Hardware()
        AcceleratorState._reset_state()  # a second run in one process may have another precision
        self.accelerator = Accelerator(
            cpu=self.hardware.device == "cpu",
            mixed_precision=_precision(self.hardware),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # see `agree`
            log_with=list(trackers) or None,
            project_dir=folder,
        )
        self.device: torch.device = self.accelerator.device
        self.part = Part(self.accelerator.process_index, self.accelerator.num_processes)
        self.main = self.accelerator.is_main_process

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over the processes."""
        return self.hardware.parallel == "fsdp2" and dist.is_available() and dist.is_initialized()

    def prepare(self, model: nn.Module, ema_decay: float | None) -> tuple[nn.Module, nn.Module, ModelEmaV3 | None]:
        """Return the model to train, the same model without its wrapper, and its averaged copy, on the device. Raises
        InputError."""
        if self.hardware.grad_checkpointing:
            if not hasattr(model, "set_grad_checkpointing"):
                raise InputError(f"grad_checkpointing: {type(model).__name__} has no set_grad_checkpointing")
            cast(Any, model).set_grad_checkpointing(True)
        if self.part.world > 1 and self.hardware.sync_batchnorm:
            model = _synchronise(model, self.device)
        model.to(self.device)
        if self.hardware.channels_last:
            model.to(memory_format=torch.channels_last)
        ema = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay)
        if self.sharded:
            for copy in (model, *([] if ema is None else [ema.module])):
                self._shard(copy)
            return model, model, ema
        if self.part.world > 1:
            with warnings.catch_warnings():  # torch 2.14 renamed an argument that Accelerate 1.15 passes
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                return self.accelerator.prepare_model(model), model, ema
        return model, model, ema

    def _shard(self, model: nn.Module) -> None:
        """Shard the model with FSDP2, block by block, then the rest. Accelerate's plugin does the same, but on GPUs
        only; this also runs on gloo, with which it is tested."""
        mesh = init_device_mesh(self.device.type, (self.part.world,))
        for module in _blocks(model):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    @contextmanager
    def training(self) -> Iterator[None]:
        """The context of forward passes in training: autocast, and BatchNorm statistics over all processes if set."""
        with ExitStack() as stack:
            stack.enter_context(self.accelerator.autocast())
            if self.hardware.sync_batchnorm:
                stack.enter_context(synchronised())
            yield

    @contextmanager
    def accumulating(self, model: nn.Module, more: bool) -> Iterator[None]:
        """The context of a backward pass. Gradients are not reduced over processes while there are `more` to add."""
        if self.sharded:
            cast(Any, model).set_requires_gradient_sync(not more)
            yield
            return
        with self.accelerator.no_sync(model) if more else nullcontext():
            yield

    def to_device(self, images: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a batch on the device of the model, in its dtype."""
        layout = torch.channels_last if self.hardware.channels_last else torch.preserve_format
        images = images.to(self.device, dtype, non_blocking=True, memory_format=layout)
        return images, labels.to(self.device, non_blocking=True)

    def sum(self, values: Sequence[float] | Tensor) -> list[float]:
        """Sum each value over the processes, in float64."""
        sums = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.part.world > 1:
            dist.all_reduce(sums)
        summed: list[float] = sums.tolist()
        return summed

    @torch.no_grad()
    def agree(self, model: nn.Module) -> None:
        """Copy the BatchNorm statistics of the first process to the others, if they are not synchronised. Call it
        before evaluation and saving."""
        if self.part.world > 1 and not self.hardware.sync_batchnorm:
            kept = model.state_dict()
            for name, _ in model.named_buffers():
                if name in kept:
                    dist.broadcast(kept[name], 0)

    def release(self, model: nn.Module) -> None:
        """Remove the wrappers for several processes and autocast from a trained model."""
        if self.part.world > 1 and not self.sharded:
            self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def wait(self) -> None:
        """Wait for every process."""
        cast(Any, self.accelerator).wait_for_everyone()

    def close(self) -> None:
        """Finish the trackers and leave the process group. Every process calls it when nothing is left to compute: a
        process that ends with the threads of gloo running may abort."""
        cast(Any, self.accelerator).end_training()


def full(tensor: Tensor) -> Tensor:
    """Return a full copy of `tensor` on the CPU. Every process must call it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().clone(memory_format=torch.contiguous_format)


def placed(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole` on the device of `like`, or its shard for this process if `like` is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)
    return whole.to(like.device)


def reseed(seed: int) -> None:
    """Seed every generator that training uses."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)
    torch.manual_seed(seed)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Restore the generators at the end of the block."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Use deterministic algorithms. torch raises an error for an operation that has none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def gpu_settings() -> GpuSettings:
    """What torch is set to on GPUs now."""
    backends: Any = torch.backends  # the stubs of torch do not know all of them
    return GpuSettings(
        torch.version.cuda, backends.cudnn.version(), backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision, backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _precision(hardware: Hardware) -> str:
    if hardware.precision == "auto":
        on_gpu = hardware.device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return "bf16" if on_gpu else "no"
    return {"float32": "no", "bfloat16": "bf16"}[hardware.precision]


def _synchronise(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace torch's BatchNorm by SyncBatchNorm. The BatchNorm of mixers and their blocks needs no change (see
    `ops.statistics`). Raises InputError for torch's BatchNorm on a CPU, which SyncBatchNorm does not support."""
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for name, module in list(model.named_modules()):
        if type(module) not in plain:
            continue
        if device.type == "cpu":
            raise InputError(f"sync_batchnorm: {name} is torch's BatchNorm, which synchronises on GPUs alone; "
                             "expected sync_batchnorm=False")  # fmt: skip
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        if not name:
            return converted
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, converted)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that FSDP2 gathers at once: the blocks of timm's trunks and those of this library."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "blocks" and isinstance(module, (nn.Sequential, nn.ModuleList)):
            yield from module
