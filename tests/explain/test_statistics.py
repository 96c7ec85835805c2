"""Statistics per layer and head against their definitions, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from equality import build, draw
from scipy.stats import spearmanr
from strategies import Host

from kernelbank.atlas import ROWS
from kernelbank.explanation.capture import explain
from kernelbank.explanation.layer import LayerMaps
from kernelbank.explanation.statistics import (
    documents,
    effective_number,
    mean,
    mean_ranks,
    rank_correlation,
    statistics,
    table,
)
from kernelbank.spec import MixerSpec

HOST = Host(32, 4, (4, 5), 1, 2)


def layer_of(text: str, host: Host = HOST) -> LayerMaps:
    mixer = build(MixerSpec.parse(text).at_block(1), host, 0).eval()
    x, _ = draw(mixer, host.batch, 1)
    (layer,) = explain(mixer, x)
    return layer


def test_the_effective_number() -> None:
    weights = torch.tensor([[1.0, 1, 1, 1], [0, 3, 0, 0], [0, 0, 0, 0], [2, 2, 0, 0]])
    torch.testing.assert_close(effective_number(weights), torch.tensor([4.0, 1, 0, 2]))


def test_ranks_and_their_correlation_are_those_of_scipy() -> None:
    torch.testing.assert_close(mean_ranks(torch.tensor([3.0, 1, 3, 0])), torch.tensor([2.5, 1, 2.5, 0]).double())
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=generator).relu(), torch.randn(3, 7, generator=generator)
    visible = torch.ones(3, 7, dtype=torch.bool)
    visible[1, 4:] = False
    ours = rank_correlation(a, b, visible)
    for row in range(3):
        theirs = spearmanr(a[row][visible[row]], b[row][visible[row]]).statistic
        assert math.isclose(float(ours[row]), theirs, abs_tol=1e-9)
    assert float(rank_correlation(torch.ones(1, 4), torch.randn(1, 4), torch.ones(1, 4, dtype=torch.bool))) == 0


@pytest.mark.parametrize("text", ["vit_relpos", "swin support=window(3, shift=1)", "nat support=neighborhood(3)",
                                  "vit_relpos activation=relu,count", "layernorm_attention"])  # fmt: skip
def test_the_statistics_of_a_map_entry_by_entry(text: str) -> None:
    layer = layer_of(text)
    assert layer.weights is not None and layer.scores is not None and layer.static is not None
    assert layer.queries is not None and layer.keys is not None
    (height, width), prefix = layer.grid, layer.prefix
    tokens = layer.tokens.expand(len(layer.positions), -1)
    found = statistics([layer])
    for head in (0, 3):
        sums = dict.fromkeys(("effective", "seen", "sparsity", "distance", "rank_correlation"), 0.0)
        count = 0
        for image in range(2):
            for position in range(prefix, prefix + height * width):
                slots = [slot for slot, token in enumerate(tokens[position].tolist()) if token >= 0]
                a = layer.weights.values[image, head, position, slots]
                size = a.abs()
                b = size / size.sum() if float(size.sum()) > 0 else size
                at = [(token - prefix) for token in tokens[position, slots].tolist()]
                y, x = divmod(position - prefix, width)
                far = torch.tensor([math.hypot(cell // width - y, cell % width - x) if cell >= 0 else 0 for cell in at])
                on_grid = torch.tensor([cell >= 0 for cell in at])
                share = b * on_grid
                q = layer.queries.values[image, head, position]
                k = layer.keys.values[image, head][layer.index.values[position, slots] if layer.index else slice(None)]
                cosine = k @ q / (k.norm(dim=-1) * q.norm())
                sums["effective"] += float(torch.exp(-(b * b.clamp(min=1e-300).log()).sum())) * bool(size.sum() > 0)
                sums["seen"] += len(slots)
                sums["sparsity"] += float((size <= 0.01 * size.max()).double().mean())
                sums["distance"] += float((share * far).sum() / share.sum().clamp(min=1e-300))
                constant = bool((a == a[0]).all())
                sums["rank_correlation"] += 0 if constant else float(spearmanr(a, cosine).statistic)
                count += 1
        for name, total in sums.items():
            assert math.isclose(getattr(found[head], name), total / count, rel_tol=1e-6, abs_tol=1e-6), name


def test_the_static_share() -> None:
    layer = layer_of("vit_relpos", Host(32, 4, (4, 5), 0, 2))
    assert layer.scores is not None and layer.static is not None
    p = layer.static.values.var(-1, unbiased=False)[None]
    d = layer.scores.values.var(-1, unbiased=False)
    expected = (p / (p + d)).mean((0, 2))
    assert torch.allclose(torch.tensor([head.static_share for head in statistics([layer])]).double(), expected)
    assert all(head.static_share == 0 and head.dynamic_share == 1 for head in statistics([layer_of("vit")]))
    assert all(head.static_share is None for head in statistics([layer_of("dwconv", Host(32, 4, (4, 5), 0, 2))]))
    shares = [head.static_share for head in statistics([layer_of("dwsa", Host(32, 4, (4, 5), 0, 2))])]
    assert all(share is not None and 0 < share < 1 for share in shares)


def test_a_delta_and_a_mean_of_taps() -> None:
    layer = layer_of("dwconv size=3", Host(32, 4, (4, 5), 0, 1))
    assert layer.kernels is not None
    layer.kernels.values.zero_()
    layer.kernels.values[..., 1, 1] = 2
    assert all((head.effective, head.seen, head.distance) == (1, 9, 0) for head in statistics([layer]))
    layer.kernels.values.fill_(-1)
    (head, *_) = statistics([layer])
    assert head.effective is not None and math.isclose(head.effective, 9) and head.sparsity == 0
    assert head.distance is not None and math.isclose(head.distance, (4 + 4 * math.sqrt(2)) / 9)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_finite_statistics_within_their_bounds(row: str) -> None:
    heads = statistics([layer_of(row, Host(64, 2, (4, 6), 0, 2))])
    assert len(heads) in (1, 2)
    for head in heads:
        values = {name: value for name, value in documents([head])[0].items() if name not in ("layer", "head")}
        assert all(value is None or math.isfinite(value) for value in values.values())
        if head.effective is not None and head.seen is not None and head.sparsity is not None:
            assert 0 <= head.effective <= head.seen * (1 + 1e-6) and 0 <= head.sparsity <= 1
        if head.rank_correlation is not None:
            assert -1 - 1e-6 <= head.rank_correlation <= 1 + 1e-6
        for share in (head.static_share, head.dynamic_share):
            assert share is None or 0 <= share <= 1


def test_the_table_has_a_row_per_layer() -> None:
    heads = statistics([layer_of("vit"), layer_of("conv", Host(32, 4, (4, 5), 0, 2))])
    lines = table(heads).splitlines()
    assert len(lines) == 2  # both are called by the empty name of a mixer alone
    assert lines[0].split()[:2] == ["layer", "heads"]
    assert mean(heads, "effective") is not None
    assert mean([head for head in heads if head.static_share is None], "static_share") is None
