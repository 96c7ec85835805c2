"""The digits split never changes."""

from __future__ import annotations

import pytest
import torch

from kernelbank.data.digits import digits
from kernelbank.data.load import load
from kernelbank.errors import InputError


def test_the_split_is_pinned() -> None:
    data = digits()
    assert (len(data.train), len(data.val), len(data.test)) == (1077, 360, 360)
    assert data.sha256 == "1f474e2f4ac04f6134bdb9e07496e217912d8a46c9575eb8a823309dc22a2015"
    assert (data.in_chans, data.img_size, data.num_classes) == (1, (8, 8), 10)
    assert data.train.images.dtype == torch.float32 and data.train.labels.dtype == torch.int64


def test_splits_are_stratified_and_normalised_by_the_training_images() -> None:
    data = digits()
    whole = torch.cat([part.labels for part in (data.train, data.val, data.test)]).bincount()
    for part in (data.train, data.val, data.test):
        share = part.labels.bincount() - whole * len(part) / 1797
        assert share.abs().max() <= 1
    torch.testing.assert_close(data.train.images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.images.std(), torch.tensor(1.0), atol=1e-5, rtol=0)
    levels = torch.cat([part.images for part in (data.train, data.val, data.test)]).unique()
    assert len(levels) == 17  # one affine map for every split


def test_data_sets_are_found_by_name() -> None:
    assert load("digits").identity.name == "digits"
    with pytest.raises(InputError, match="unknown data set 'digit'; did you mean 'digits'"):
        load("digit")
