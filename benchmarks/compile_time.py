"""Measure how long torch.compile takes for a model, cold: ``python benchmarks/compile_time.py FILE MODEL MODEL ...``.

Every compilation is a process of its own with an empty cache, and the models take turns for ROUNDS rounds. The time is
that of the first call of the compiled model (batch 8, float32, no gradients), the C++ compiler included. FILE gets the
times; a Markdown table with the ratios of medians to the first model is printed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from kernelbank.files import replace_text
from kernelbank.records import CodeIdentity, MachineIdentity

ROUNDS = 3
SIDES = {"swin": 56}
"""Smaller images for a family, by a part of its name: the graph is the same, and the runs are shorter."""
PROGRAM = """
import sys, time, timm, torch, kernelbank.models
name, side = sys.argv[1], int(sys.argv[2])
model, images = timm.create_model(name, img_size=side).eval(), torch.randn(8, 3, side, side)
compiled = torch.compile(model, fullgraph=True)
with torch.no_grad():
    start = time.perf_counter()
    compiled(images)
print(time.perf_counter() - start)
"""


def side_of(model: str) -> int:
    """The side of the images of a model."""
    return next((side for part, side in SIDES.items() if part in model), 224)


def seconds(model: str) -> float:
    """Compile `model` in a new process without any cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
        command = [sys.executable, "-c", PROGRAM, model, str(side_of(model))]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])


def main(file: str, *models: str) -> None:
    """Measure, write and print."""
    code = CodeIdentity.here()
    times: dict[str, list[float]] = {model: [] for model in models}
    for _ in range(ROUNDS):
        for model, found in times.items():
            found.append(round(seconds(model), 2))
    record = {
        "code": asdict(code), "machine": asdict(MachineIdentity.here(torch.get_num_threads())), "batch": 8,
        "seconds": times, "sides": {model: side_of(model) for model in models},
    }  # fmt: skip
    replace_text(Path(file), json.dumps(record, indent=2) + "\n")
    base = median(times[models[0]])
    print("| model | side | seconds, each round | median relative to the first |\n|---|---|---|---|")
    for model, found in times.items():
        shown = ", ".join(f"{value:.1f}" for value in found)
        print(f"| `{model}` | {side_of(model)} | {shown} | {median(found) / base:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
