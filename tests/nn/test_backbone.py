"""The backbone: published sizes, every row on both trunks, weights by name, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernelbank import SpecError
from kernelbank.atlas import ROWS
from kernelbank.model import ModelSpec, SwinTrunk, Trunk, ViTTrunk
from kernelbank.nn.backbone import Backbone
from kernelbank.nn.build import build_backbone
from kernelbank.nn.layers import initialise
from kernelbank.zoo import SMALL, deit, swin

SWIN_T = swin(96, 6)


def build(trunk: Trunk, mixer: str, mlp: str = "ffn", **sizes: Any) -> Backbone:
    rate = sizes.pop("drop_path_rate", 0.0)
    return build_backbone(ModelSpec(trunk=trunk, mixer=mixer, mlp=mlp, **sizes), drop_path_rate=rate)


@pytest.mark.parametrize(("trunk", "mixer", "published"), [
    (deit(192), "vit", 5_717_416), (deit(384), "vit", 22_050_664), (deit(768), "vit", 86_567_656),
    (SWIN_T, "swin", 28_288_354), (SWIN_T, "dwnet", 24_172_744), (SWIN_T, "ddwconv", 51_131_752),
    (SWIN_T, "iddwconv", 26_243_176), (deit(384, on_grid_alone=True), "dwsa", 20_253_040),
])  # fmt: skip
def test_published_sizes_are_exact(trunk: Trunk, mixer: str, published: int) -> None:
    with torch.device("meta"):
        model = build(trunk, mixer, img_size=(224, 224))
    assert sum(p.numel() for p in model.parameters()) == published


def small(plain: bool, prefix: bool = False) -> Trunk:
    if plain:
        return ViTTrunk(
            patch_size=(2, 2), embed_dim=32, depth=2, num_heads=2, class_token=prefix, reg_tokens=2 * prefix,
            pos_embed="learn" if prefix else "none", global_pool="token" if prefix else "avg",
        )  # fmt: skip
    return SwinTrunk(patch_size=(1, 1), embed_dim=32, depths=(1, 2), num_heads=(2, 4))


@pytest.mark.parametrize(
    "trunk", [small(True), small(True, prefix=True), small(False)], ids=["plain", "tokens", "stages"]
)
@pytest.mark.parametrize("row", ROWS)
def test_every_row_runs_as_mixer_and_learns(row: str, trunk: Trunk) -> None:
    """Non-square, odd grids; as the mixer with the FFN, and as the MLP itself without a mixer of its own kind."""
    text = "swin support=window(3, alternate)" if row == "swin" else row
    model = build(trunk, text, text, img_size=(6, 10), in_chans=1, num_classes=3, drop_path_rate=0.1)
    x = torch.randn(2, 1, 6, 10)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    alone = model.eval()(x[:1])
    assert alone.shape == (1, 3) and torch.allclose(alone, model(x)[:1], atol=1e-5)


@pytest.mark.parametrize("mlp", ["none", "ffn activation=relu", "conv", "se", "ffn | dwconv"])
def test_any_record_is_an_mlp_or_none(mlp: str) -> None:
    model = build(small(False), "dwnet | vit", mlp, img_size=(6, 6), in_chans=1, num_classes=3)
    assert model(torch.randn(2, 1, 6, 6)).isfinite().all()
    assert (model.layers[0].blocks[0].mlp is None) == (mlp == "none")


def test_blocks_alternate_their_shift_inside_the_stage() -> None:
    trunk = SwinTrunk(patch_size=(1, 1), embed_dim=8, depths=(3, 2), num_heads=(2, 2))
    model = build(trunk, "swin support=window(2, alternate)", img_size=(8, 8), in_chans=1, num_classes=2)
    assert [[b.attn.spec.support.shift for b in stage.blocks] for stage in model.layers] == [[0, 1, 0], [0, 1]]


def test_weights_come_from_seed_and_name_alone() -> None:
    """Rows with different parameters are paired: what they share is equal, in any order of construction."""
    make = lambda mixer: build(SMALL["plain"].trunk, mixer, img_size=(8, 8), in_chans=1, num_classes=10)  # noqa: E731
    a, b, c = make("vit_relpos"), make("dwsa"), make("vit_relpos")
    for model, seed in ((a, 0), (b, 0), (c, 1)):
        torch.manual_seed(seed + 5)
        initialise(model, seed)
    theirs, other = dict(b.named_parameters()), dict(c.named_parameters())
    shared = [name for name in dict(a.named_parameters()) if name in theirs]
    assert "blocks.0.attn.table.weight" in shared and "blocks.0.attn.value.weight" not in theirs
    assert all(torch.equal(p, theirs[n]) for n, p in a.named_parameters() if n in shared)
    assert not any(torch.equal(p, other[n]) for n, p in a.named_parameters() if n.endswith("weight") and p.ndim > 1)
    assert not torch.equal(a.blocks[0].attn.q.weight, a.blocks[1].attn.q.weight)


def test_no_weight_decay_names_tables_and_embeddings() -> None:
    model = build(small(True, prefix=True), "vit_relpos", img_size=(4, 4), num_classes=2)
    assert model.no_weight_decay() == {"cls_token", "reg_token", "pos_embed", "dist_token"} | {
        f"blocks.{i}.attn.table.{kind}" for i in range(2) for kind in ("weight", "prefix")
    }


@pytest.mark.parametrize(("make", "message"), [
    (lambda: build(small(True), "vit", img_size=(7, 8)), r"invalid img_size=\(7, 8\)"),
    (lambda: SwinTrunk(depths=(1, 1), num_heads=(1,)), r"invalid num_heads=\(1,\)"),
    (lambda: build(small(False), "vit | vit | vit", img_size=(8, 8)), "expected 1 or 2 specs for 2 stages, got 3"),
    (lambda: build(ViTTrunk(patch_size=(2, 2), embed_dim=30, num_heads=4), "vit", img_size=(8, 8)), "invalid dim=30;"),
    (lambda: build(small(True), "vitt", img_size=(8, 8)), "did you mean 'vit'"),
])  # fmt: skip
def test_bad_input_is_one_clear_error(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()
