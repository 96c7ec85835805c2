"""Runs a command whole, then again with SIGKILLs at random moments: ``python killing.py KILLS SEED FOLDER WORD ...``.

Everything is imported once; every run is a fork of this process, which itself never trains. ``OUT`` among the words
stands for the run's folder. The probe of the machine prefers another linear layer, which rounds differently, in every
other fork: what is trained must not depend on it. Prints how many kills met a living process.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from kernelbank.cli import main
from kernelbank.ops import machine
from kernelbank.ops.linear import plain
from kernelbank.ops.paths import LINEAR_PATHS

GAINS = itertools.cycle((1.5, 0.9))
"""How fast the probe finds 1 x 1 convolutions, relative to F.linear."""


def started(words: list[str], folder: Path) -> int:
    """The process id of a fork that runs `words`."""
    gain = next(GAINS)
    resume = ["--resume"] if words[0] == "train" and (folder / "run.json").exists() else []
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        torch.set_num_threads(1)
        machine.probe = lambda device="cpu", dtype=None: machine.Machine(
            device, 1, True, False, {"conv1x1": (gain, gain)}
        )
        other = replace(LINEAR_PATHS["conv1x1"], run=lambda *x, **options: plain(*x, **options) * (1 + 1e-6))
        LINEAR_PATHS["conv1x1"] = other
        sys.stdout = sys.stderr = open(folder.with_suffix(".txt"), "a")
        code = main([str(folder) if word == "OUT" else word for word in words] + resume)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """Its exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    kills, seed, base, words = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    begun = time.monotonic()
    assert ended(started(words, base / "whole")) == 0
    duration, moments, hits = time.monotonic() - begun, random.Random(seed), 0
    for _ in range(kills):
        pid = started(words, base / "killed")
        time.sleep(moments.uniform(0.0, 2.0 * duration / (kills + 1)))
        os.kill(pid, signal.SIGKILL)
        hits += ended(pid) == -signal.SIGKILL
    assert ended(started(words, base / "killed")) == 0
    print(hits)
