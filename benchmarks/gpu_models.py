"""Images per second and training steps of whole models on a GPU under torch.compile, for ``benchmarks/gpu.py``.

Every subject is a process of its own, so that all of them compile at the same time; then they are timed one at a time,
in rounds. ``python benchmarks/gpu_models.py DEVICE SIDE BATCH SUBJECT`` is such a process: it prints a line of JSON
once it has compiled, and another one for every line that it reads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from gpu_operators import peak_bytes, seconds
from torch import Tensor, nn

from kernelbank.benchmark.timing import Distribution, ratios
from kernelbank.nn.build import build
from kernelbank.ops.kernels.launch import gpu
from kernelbank.ops.paths import triton
from kernelbank.train.model import describe


@dataclass(frozen=True)
class Subject:
    """A model by name with the text of its mixers, None for a model of timm's as it is. `kernels` lets the plan take
    the Triton kernels wherever they support a mixer."""

    model: str
    mixer: str | None = None
    kernels: bool = False

    @property
    def text(self) -> str:
        """The subject in a record."""
        return " ".join(filter(None, [self.model, self.mixer and f": {self.mixer}", "@triton" if self.kernels else ""]))


DEIT, SWIN = "vit_kb_small_patch16_224", "swin_kb_tiny_patch4_window7_224"
SUBJECTS: dict[str, tuple[Subject, ...]] = {
    "deit_small_patch16_224": (
        Subject("deit_small_patch16_224"), Subject(DEIT, "vit"), Subject(DEIT, "relu_attention position=relative"),
        Subject(DEIT, "relu_attention position=relative", True),
        Subject(DEIT, "layernorm_attention position=relative", True), Subject(DEIT, "dwsa"),
        Subject(DEIT, "dwsa", True),
    ),
    "swin_tiny_patch4_window7_224": (
        Subject("swin_tiny_patch4_window7_224"), Subject(SWIN), Subject(SWIN, kernels=True),
        Subject(SWIN, "activation=relu,count", True), Subject(SWIN, "activation=layernorm,count", True),
        Subject("swin_dwsa_tiny", kernels=True),
    ),
}  # fmt: skip
"""By the model of timm's that each group is compared with, which is its first subject."""


# ---- a subject in its process ----------------------------------------------------------------------------


def serve(subject: Subject, device: str, side: int, batch: int) -> None:
    """Build and compile a subject, then time a call of each kind for every line on standard input."""
    torch.manual_seed(0)
    if subject.kernels:
        names = [*(path.name for path in triton.PATHS), triton.POSITION.name]
        words = gpu(None).name.replace("-", " ").split() if device == "cuda" else []
        triton.AHEAD = {name: frozenset(words) for name in names}
    model = _model(subject, side).to(device)
    x = torch.randn(batch, 3, side, side, device=device)
    calls = {"inference": _inference(model, x, device), "training step": _training(model, x, device)}
    for run in calls.values():
        for _ in range(3):
            run()
    print(json.dumps({"peak_bytes": {name: peak_bytes(run, device) for name, run in calls.items()}}), flush=True)
    for line in sys.stdin:
        count = int(line)
        print(json.dumps({name: seconds(run, count, device) for name, run in calls.items()}), flush=True)


def _model(subject: Subject, side: int) -> nn.Module:
    if subject.model in SUBJECTS:
        return cast(nn.Module, timm.create_model(subject.model, img_size=side))
    return build(describe(subject.model, mixer=subject.mixer, img_size=(side, side)))


def _inference(model: nn.Module, x: Tensor, device: str) -> Callable[[], object]:
    compiled = torch.compile(model, dynamic=False)

    def run() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            compiled(x)

    return run


def _training(model: nn.Module, x: Tensor, device: str) -> Callable[[], object]:
    """Forward pass, loss, backward pass and AdamW."""
    compiled, target = torch.compile(model, dynamic=False), torch.zeros(len(x), dtype=torch.long, device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")

    def run() -> None:
        model.train()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(compiled(x), target)
        loss.backward()
        optimiser.step()

    return run


# ---- all subjects ----------------------------------------------------------------------------------------


def measure(device: str, side: int, batch: int, rounds: int, count: int, group: str) -> list[dict[str, Any]]:
    """One line per subject of a group and kind of call. A subject that fails has its last line of output instead."""
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    processes = {}
    for subject in SUBJECTS[group]:
        words = [sys.executable, __file__, device, str(side), str(batch), json.dumps(vars(subject))]
        processes[subject] = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
    ready, failed = {}, {}
    for subject, process in processes.items():
        assert process.stdout and process.stderr
        if line := process.stdout.readline():
            ready[subject] = json.loads(line)
        else:
            failed[subject] = (process.stderr.read().strip().splitlines() or ["no output"])[-1]
    taken = {subject: list[dict[str, float]]() for subject in ready}
    for _ in range(rounds):
        for subject in ready:
            process = processes[subject]
            assert process.stdin and process.stdout
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            taken[subject].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    base = taken[SUBJECTS[group][0]]
    lines = [
        {"subject": subject.text, "side": side, "batch": batch, "failure": text} for subject, text in failed.items()
    ]
    for subject, rounds_of in taken.items():
        for name in rounds_of[0]:
            values = [each[name] for each in rounds_of]
            time, ahead = Distribution.of(values), ratios([each[name] for each in base], values)
            lines.append({
                "subject": subject.text, "side": side, "batch": batch, "call": name, "seconds": vars(time),
                "images_per_second": batch / time.median, "base": group, "ratio": vars(ahead),
                "peak_bytes": ready[subject]["peak_bytes"][name],
            })  # fmt: skip
    return lines


def main() -> None:
    """Serve the subject of the arguments."""
    device, side, batch, subject = sys.argv[1:]
    partial(serve, Subject(**json.loads(subject)))(device, int(side), int(batch))


if __name__ == "__main__":
    main()
