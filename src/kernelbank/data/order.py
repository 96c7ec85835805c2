"""The order of the images in an epoch, and their distribution over batches and processes. It depends on (seed, epoch)
alone, so that any number of processes sees the same images in the same updates."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.distributed_sampler import RepeatAugSampler

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """A micro-batch of one process: rows of the split, a seed for the augmentation of each, and how many count.

    `real` is 0 if the process has no image left. It then computes a batch that does not count, since the processes
    communicate in every step.
    """

    rows: Integers
    seeds: Integers
    real: int


@dataclass(frozen=True)
class Update:
    """One update of the weights: `size` images over all processes, and this process's micro-batches."""

    size: int
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Part:
    """The rank of a process and the number of processes."""

    rank: int = 0
    world: int = 1


def derive(seed: int, epoch: int, what: str) -> int:
    """Return a seed for each (seed, epoch, purpose). Neighbouring seeds give independent streams."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}/{what}".encode()).digest()[:8], "big") >> 1


def epoch_rows(count: int, repeats: int, seed: int, epoch: int) -> Integers:
    """Return the rows of an epoch in order: a permutation of `count`, or timm's repeated augmentation, in which each
    sampled image is repeated `repeats` times and the epoch keeps its length."""
    order = derive(seed, epoch, "order")
    if repeats == 1:
        return torch.randperm(count, generator=torch.Generator().manual_seed(order)).numpy()
    sampler = RepeatAugSampler(range(count), num_replicas=1, rank=0, num_repeats=repeats)
    sampler.set_epoch(order)
    return np.fromiter(sampler, np.int64, len(sampler))


def epoch_length(count: int, repeats: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of updates of an epoch, which is 0 if `drop_last` leaves no full batch."""
    drawn = count if repeats == 1 else len(RepeatAugSampler(range(count), num_replicas=1, rank=0, num_repeats=repeats))
    return drawn // batch_size if drop_last else math.ceil(drawn / batch_size)


def updates(
    rows: Integers, seeds: Integers, batch_size: int, micro: int, drop_last: bool, part: Part
) -> Iterator[Update]:
    """Yield the updates of an epoch for one process, which takes every `world`-th image from `rank` on, `micro` at a
    time.

    Every process gets the same number of micro-batches, since the processes communicate in every step.
    """
    end = len(rows) - len(rows) % batch_size if drop_last else len(rows)
    for start in range(0, end, batch_size):
        stop = min(start + batch_size, end)
        mine = np.arange(start + part.rank, stop, part.world)
        rounds = math.ceil(math.ceil((stop - start) / part.world) / micro)
        pieces = [mine[i * micro : (i + 1) * micro] for i in range(rounds)]
        filled = [piece if len(piece) else np.array([start]) for piece in pieces]
        yield Update(
            stop - start,
            tuple(Share(rows[at], seeds[at], len(piece)) for at, piece in zip(filled, pieces, strict=True)),
        )


def in_order(count: int, batch: int, part: Part) -> Iterator[Share]:
    """Yield every row exactly once over all processes, with the same number of batches on each, for evaluation."""
    for start in range(0, count, batch * part.world):
        at = np.arange(start + part.rank, min(start + batch * part.world, count), part.world)
        filled = at if len(at) else np.array([0])
        yield Share(filled, np.zeros(len(filled), np.int64), len(at))
