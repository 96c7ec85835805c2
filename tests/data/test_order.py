"""The order of an epoch: every image once, the same images in an update however many processes share it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from kernelbank.data.order import Part, epoch_length, epoch_rows, in_order, updates


@settings(max_examples=30)
@given(
    count=st.integers(1, 60), batch=st.integers(1, 20), micro=st.integers(1, 9), world=st.integers(1, 5),
    drop_last=st.booleans(),
)  # fmt: skip
def test_processes_share_out_the_updates_of_one(
    count: int, batch: int, micro: int, world: int, drop_last: bool
) -> None:
    rows, seeds = epoch_rows(count, 1, 0, 0), np.arange(count) + 100
    assert sorted(rows) == list(range(count))
    whole = list(updates(rows, seeds, batch, batch, drop_last, Part()))
    parts = [list(updates(rows, seeds, batch, micro, drop_last, Part(rank, world))) for rank in range(world)]
    assert len(whole) == epoch_length(count, 1, batch, drop_last)
    for index, update in enumerate(whole):
        shares = [share for part in parts for share in part[index].shares]
        assert len({len(part[index].shares) for part in parts}) == 1  # or some would wait for ever
        assert all(0 < len(share.rows) <= micro for share in shares)
        found = [
            pair for share in shares for pair in zip(share.rows[: share.real], share.seeds[: share.real], strict=True)
        ]
        assert sorted(found) == sorted(zip(update.shares[0].rows, update.shares[0].seeds, strict=True))
        assert sum(share.real for share in shares) == update.size == part_size(parts, index)


def part_size(parts: list[list[object]], index: int) -> int:
    (size,) = {part[index].size for part in parts}  # type: ignore[attr-defined]
    return int(size)


@settings(max_examples=30)
@given(count=st.integers(1, 60), batch=st.integers(1, 20), world=st.integers(1, 5))
def test_evaluation_reads_every_image_once(count: int, batch: int, world: int) -> None:
    parts = [list(in_order(count, batch, Part(rank, world))) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(row for part in parts for share in part for row in share.rows[: share.real]) == list(range(count))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_repeated_augmentation_is_timms(world: int) -> None:
    """Every process gets the very images that timm's sampler, which is DeiT's, gives it."""
    rows = epoch_rows(700, 3, 5, 2)
    from kernelbank.data.order import derive

    for rank in range(world):
        sampler = RepeatAugSampler(range(700), num_replicas=world, rank=rank, num_repeats=3)
        sampler.set_epoch(derive(5, 2, "order"))
        assert list(rows[rank::world]) == list(sampler)
    assert len(rows) == 512 and np.bincount(rows).max() == 3


def test_epochs_and_seeds_give_other_orders() -> None:
    first = epoch_rows(50, 1, 0, 0).tolist()
    assert first == epoch_rows(50, 1, 0, 0).tolist() != epoch_rows(50, 1, 0, 1).tolist()
    assert first != epoch_rows(50, 1, 1, 0).tolist()
