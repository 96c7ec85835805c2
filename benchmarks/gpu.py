"""Everything that is measured on a GPU, in one command: ``python benchmarks/gpu.py``.

It checks the Triton kernels against float64 in float32, float16 and bfloat16, times them against what a user would run
instead, times whole models under torch.compile against timm's, and writes a run record to ``records/gpu``. A kernel
becomes a default (`kernelbank.ops.paths.triton.AHEAD`) only by such a record.

``--device cpu`` runs the same with tiny sizes, as a test of the program and not of a machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_models
import gpu_operators
import torch
from gpu_operators import Site

from kernelbank.files import replace_text
from kernelbank.records import CodeIdentity, MachineIdentity
from kernelbank.train.engine import gpu_settings

HERE = Path(__file__).resolve().parent
RECORD_VERSION = 1
CASES = ("kernel_cases.py", "path_cases.py")


@dataclass(frozen=True)
class Plan:
    """What is measured: the (batch, side) of operators in tokens and of models in pixels, and how many rounds."""

    operators: tuple[tuple[int, int], ...]
    models: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]
    rounds: int
    calls: int


PLANS = {
    "cuda": Plan(((128, 14), (43, 24), (8, 56), (6, 64)), ((128, 224), (43, 384), (6, 1024)),
                 tuple(gpu_models.SUBJECTS), 7, 3),
    "cpu": Plan(((1, 7),), (), (), 2, 1),
}  # fmt: skip
"""By device. The batches hold about as many tokens at every size."""


def check(device: str, seeds: int) -> dict[str, Any]:
    """The number of calls of the kernels and of their paths that were compared with float64, the largest differences
    relative to the largest value, and the cases above their tolerance."""
    tests = HERE.parent / "tests"
    paths = os.pathsep.join([str(tests), str(HERE.parent / "src"), str(tests / "ops")])
    environment = os.environ | {"PYTHONPATH": paths} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    lines = []
    for script in CASES:
        words = [sys.executable, str(tests / "ops" / script), device, *([str(seeds)] if script == CASES[0] else [])]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
        lines += [json.loads(line) for line in done.stdout.splitlines()]
    worst: dict[str, float] = {}
    for line in lines:
        key = f"{line['kind']} {line['dtype']}"
        worst[key] = max(worst.get(key, 0.0), *line["errors"].values())
    above = [line for line in lines if max(line["errors"].values()) > line["tolerance"]]
    return {"calls": len(lines), "worst": worst, "above_tolerance": above}


def record(device: str, plan: Plan, seeds: int) -> dict[str, Any]:
    """Check and measure everything in `plan`."""
    on_gpu = device == "cuda"
    identity = MachineIdentity.here(
        torch.get_num_threads(), torch.cuda.get_device_name() if on_gpu else None, 1, gpu_settings() if on_gpu else None
    )
    print("correctness ...", flush=True)
    checked = check(device, seeds)
    print(f"{checked['calls']} calls, worst {checked['worst']}, {len(checked['above_tolerance'])} above", flush=True)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    sites = [Site(batch, side, dtype=dtype, device=device, **({} if on_gpu else {"heads": 1, "width": 16}))
             for batch, side in plan.operators]  # fmt: skip
    limits = gpu_operators.ceilings(sites[0])
    operators = []
    for site in sites:
        print(f"operators, {site.batch} images of {site.side} x {site.side} tokens ...", flush=True)
        operators += gpu_operators.measure(site, plan.rounds, limits)
    models = []
    for batch, side in plan.models:
        for group in plan.groups:
            print(f"{group}, {batch} images of {side} x {side} pixels ...", flush=True)
            models += gpu_models.measure(device, side, batch, plan.rounds, plan.calls, group)
    return {
        "record_version": RECORD_VERSION, "code": asdict(CodeIdentity.here()),
        "machine": asdict(identity) | {"device": identity.accelerator or "cpu"}, "correctness": checked,
        "ceilings": limits, "sdpa": {str(site.tokens): gpu_operators.sdpa_backend(site) for site in sites},
        "operators": operators, "models": models,
    }  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["| kernel | N | pass | ms | of its floor | against |", "|---|---|---|---|---|---|"]
    for line in document["operators"]:
        against = ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in line["ratios"].items())
        milliseconds = line["seconds"]["kernel"]["median"] * 1e3
        lines.append(f"| {line['path']} | {line['tokens']} | {line['pass']} | "
                     f"{milliseconds:.3f} | {line['share_of_floor']:.0%} | {against} |")  # fmt: skip
    lines += ["", "| model | pixels | call | images/s | against timm's | quartiles |", "|---|---|---|---|---|---|"]
    for line in document["models"]:
        if "failure" in line:
            lines.append(f"| {line['subject']} | {line['side']} | failed: {line['failure'][:80]} | | | |")
            continue
        ratio = line["ratio"]
        lines.append(f"| {line['subject']} | {line['side']} | {line['call']} | {line['images_per_second']:.0f} | "
                     f"{ratio['median']:.2f} | {ratio['low']:.2f}-{ratio['high']:.2f} |")  # fmt: skip
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the record, or print one as tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(PLANS), default="cuda")
    parser.add_argument("--out", type=Path, default=None, help="default: records/gpu/DEVICE.json")
    parser.add_argument("--seeds", type=int, default=40, help="random calls of each kernel and dtype")
    parser.add_argument("--table", type=Path, default=None, help="print this record as tables and measure nothing")
    options = parser.parse_args(argv)
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("invalid --device cuda; expected a machine on which torch finds a CUDA GPU")
    document = record(options.device, PLANS[options.device], options.seeds)
    name = document["machine"]["device"].replace(" ", "-").lower()
    out = options.out or HERE.parent / "records" / "gpu" / f"{name}.json"
    replace_text(out, json.dumps(document, indent=1) + "\n")
    print(table(document), f"\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
