"""Subjects measured side by side, and what was found as plain data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from kernelbank.benchmark.subjects import Runner, Site, Subject
from kernelbank.benchmark.timing import Distribution, exponent, gemm_ceiling, interleave, peak_memory, ratios, verdict


@dataclass(frozen=True)
class Row:
    """One subject at one site. `ratio` is against the first subject of the run at the same site."""

    subject: str
    site: Site
    seconds: Distribution
    ratio: Distribution
    verdict: str
    images_per_second: float
    macs: int
    ceiling_fraction: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Growth:
    """How the seconds of a subject grow with its positions: seconds ~ positions^exponent."""

    subject: str
    exponent: float
    sides: tuple[int, ...]


def measure(
    subjects: Sequence[Subject], sites: Sequence[Site], rounds: int, memory: bool, said: Callable[[str], None]
) -> tuple[list[Row], float]:
    """Every subject at every site, in turns; also the multiply-adds a second of the fastest linear."""
    half = sites[0].half
    ceiling = gemm_ceiling(torch.bfloat16 if half else torch.float32)
    rows = []
    for site in sites:
        said(f"batch {site.batch}, side {site.side}")
        runners = {subject.text: Runner(subject, site) for subject in subjects}
        taken = interleave({text: runner.step for text, runner in runners.items()}, rounds)
        base = taken[subjects[0].text]
        for text, runner in runners.items():
            rows.append(_row(text, site, taken[text], base, runner, ceiling, memory))
    return rows, ceiling


def _row(
    text: str, site: Site, seconds: list[float], base: list[float], runner: Runner, ceiling: float, memory: bool
) -> Row:
    ratio, macs = ratios(base, seconds), runner.macs()
    work = macs * site.batch * (3 if site.train else 1)
    return Row(
        subject=text,
        site=site,
        seconds=Distribution.of(seconds),
        ratio=ratio,
        verdict="base" if seconds is base else verdict(ratio),
        images_per_second=site.batch / median(seconds),
        macs=macs,
        ceiling_fraction=work / median(seconds) / ceiling,
        peak_bytes=peak_memory(runner.step) if memory else None,
    )


def growths(rows: Sequence[Row]) -> list[Growth]:
    """The fitted exponent of every subject measured at three sides or more, in positions (side squared)."""
    found = []
    for text in dict.fromkeys(row.subject for row in rows):
        mine = [row for row in rows if row.subject == text]
        sides = sorted({row.site.side for row in mine})
        if len(sides) < 3:
            continue
        batch = mine[0].site.batch
        points = {row.site.side: row.seconds.median for row in mine if row.site.batch == batch}
        found.append(Growth(text, exponent([s * s for s in sides], [points[s] for s in sides]), tuple(sides)))
    return found
