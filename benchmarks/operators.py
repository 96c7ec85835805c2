"""Profile subjects: ``python benchmarks/operators.py SUBJECT ...``, with subjects as `kernelbank benchmark` takes them.

Prints the share and the milliseconds of torch's operators in one forward pass of each subject.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from kernelbank.benchmark.subjects import Runner, Site, read

PASSES = 5
SHOWN = 12


def lines(subject: str, site: Site) -> Iterator[str]:
    """The operators that take the most time themselves, over PASSES passes after two for warm-up."""
    runner = Runner(read(subject), site)
    for _ in range(2):
        runner.step()
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        for _ in range(PASSES):
            runner.step()
    events = sorted(taken.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    yield f"{subject}: {total / PASSES / 1e3:.0f} ms"
    for event in events[:SHOWN]:
        own = event.self_cpu_time_total
        yield f"  {own / total:6.1%} {own / PASSES / 1e3:8.1f} ms  {event.count // PASSES:4d} x {event.key}"


def main() -> None:
    """Profile every subject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", metavar="SUBJECT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    for subject in options.subjects:
        print(*lines(subject, Site(options.batch, options.img_size, half=options.bf16)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
