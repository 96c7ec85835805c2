"""Runs a command whole, then again with SIGKILLs at random moments: ``python killing.py KILLS SEED FOLDER WORD ...``.

Everything is imported once; every run is a fork of this process, which itself never trains. ``OUT`` among the words
stands for the run's folder. Prints how many kills met a living process.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from kernelbank.cli import main


def started(words: list[str], folder: Path) -> int:
    """The process id of a fork that runs `words`."""
    resume = ["--resume"] if words[0] == "train" and (folder / "run.json").exists() else []
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        torch.set_num_threads(1)
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
