"""Measure subjects side by side and return the results as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from kernelbank.benchmark.subjects import FileRunner, Runner, Site, Subject, runner
from kernelbank.benchmark.timing import Distribution, exponent, gemm_ceiling, interleave, peak_memory, ratios, verdict


@dataclass(frozen=True)
class Measurement:
    """The measurement of one subject at one site.

    `seconds` are per call. `ratio` is the speed relative to the first subject of the run at the same site, and
    `verdict` states what it supports. `macs` are the multiply-adds of one image in closed form. `ceiling_fraction` is
    the rate of the multiply-adds on the paths that ran, over that of the fastest linear layer; both are None for a
    file. `peak_bytes` is the peak memory of one call, or None if it was not measured.
    """

    subject: str
    site: Site
    seconds: Distribution
    ratio: Distribution
    verdict: str
    images_per_second: float
    macs: int | None
    ceiling_fraction: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Growth:
    """The growth of a subject's time with the number of positions: seconds ~ positions^exponent."""

    subject: str
    exponent: float
    sides: tuple[int, ...]


def measure(
    subjects: Sequence[Subject], sites: Sequence[Site], rounds: int, memory: bool, notify: Callable[[str], None]
) -> tuple[list[Measurement], float]:
    """Measure every subject at every site, in turns. Returns the rows and the multiply-adds per second of the fastest
    linear layer. `notify` is called with a line for each site."""
    half = sites[0].half
    ceiling = gemm_ceiling(torch.bfloat16 if half else torch.float32)
    rows = []
    for site in sites:
        notify(f"batch {site.batch}, side {site.side}")
        runners = {subject.text: runner(subject, site) for subject in subjects}
        seconds = interleave({text: one.step for text, one in runners.items()}, rounds)
        base = seconds[subjects[0].text]
        for text, one in runners.items():
            rows.append(_row(text, site, seconds[text], base, one, ceiling, memory))
    return rows, ceiling


def _row(
    text: str,
    site: Site,
    seconds: list[float],
    base: list[float],
    built: Runner | FileRunner,
    ceiling: float,
    memory: bool,
) -> Measurement:
    ratio = ratios(base, seconds)
    counted = built.path_macs()
    work = None if counted is None else counted * site.batch * (3 if site.train else 1)
    return Measurement(
        subject=text,
        site=site,
        seconds=Distribution.of(seconds),
        ratio=ratio,
        verdict="base" if seconds is base else verdict(ratio),
        images_per_second=site.batch / median(seconds),
        macs=built.macs,
        ceiling_fraction=None if work is None else work / median(seconds) / ceiling,
        peak_bytes=peak_memory(built.step) if memory else None,
    )


def growths(rows: Sequence[Measurement]) -> list[Growth]:
    """Fit the exponent of every subject that was measured at three or more sides. Positions are the side squared."""
    results = []
    for text in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == text]
        sides = sorted({row.site.side for row in mine})
        if len(sides) < 3:
            continue
        batch = mine[0].site.batch
        points = {row.site.side: row.seconds.median for row in mine if row.site.batch == batch}
        results.append(Growth(text, exponent([s * s for s in sides], [points[s] for s in sides]), tuple(sides)))
    return results
