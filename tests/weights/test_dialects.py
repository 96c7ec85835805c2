"""Every dialect: there and back bit by bit, against keys written by hand, and against the libraries' own models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging, SwinTransformer, get_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from tiny_models import PLAIN, STAGES, drawn

from kernelbank.errors import InputError
from kernelbank.weights.changes import UNFOLD
from kernelbank.weights.convert import SourceState, convert_state, differing, read, write
from kernelbank.weights.dialects import DIALECTS, Dialect, MissingLibraryError, detect, huggingface, named
from kernelbank.weights.from_timm import create, read_model, with_state
from kernelbank.weights.infer import Inferred, infer
from kernelbank.weights.proof import TOLERANCE, prove
from kernelbank.weights.stock import build_stock

ids = [f"{d.name}-{d.family}" for d in DIALECTS]
Models = dict[str, Any]


HEADLESS = ("huggingface-dinov2", "huggingface-dinov2-registers", "huggingface-siglip")
WITH = {"facebook": " scaled", "facebook-registers": " registers", "huggingface-dinov2": " scaled",
        "huggingface-dinov2-registers": " registers", "huggingface-clip": " pre_norm",
        "huggingface-clip-bare": " pre_norm", "huggingface-siglip": " tokens"}  # fmt: skip


def fitting(dialect: Dialect, models: Models) -> Any:
    """A model that the dialect has a place for."""
    headless = " headless" if dialect.bare or dialect.name in HEADLESS else ""
    return models[dialect.family + WITH.get(dialect.name, "") + headless]


def source_of(model: Any, dialect: Dialect) -> SourceState:
    """The model, read off its shapes, or as it is where the shapes do not tell the pooling that the dialect has."""
    if "global_pool" in dialect.trunk and model.global_pool != "token":
        return read(model.state_dict(), lambda *_: Inferred(read_model(model)))
    return read(model.state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].flatten().view(torch.uint8), b[k].flatten().view(torch.uint8))
        for k in a
    )


@pytest.mark.parametrize(("dialect", "dtype"), [
    *((dialect, torch.float32) for dialect in DIALECTS), *((dialect, torch.bfloat16) for dialect in DIALECTS[2:4]),
], ids=lambda value: f"{value.name}-{value.family}" if isinstance(value, Dialect) else str(value))  # fmt: skip
def test_there_and_back_is_bit_equal(dialect: Dialect, dtype: torch.dtype, models: Models) -> None:
    model = fitting(dialect, models).to(dtype)
    state = model.state_dict()
    first = next(iter(state))
    state[first].flatten()[:3] = torch.tensor([float("nan"), -0.0, float("inf")])  # bits, not values
    source = source_of(model, dialect)
    there = write(source, dialect)
    assert differing(source, there, dialect) == []
    again = read(there)
    assert again.dialect == dialect and again.spec.trunk == source.spec.trunk
    assert same(write(again, source.dialect), state)
    assert same(write(again, dialect), there)
    assert len({t.untyped_storage().data_ptr() for t in there.values()}) == len(there), "tensors share memory"


@pytest.mark.parametrize("dialect", DIALECTS, ids=ids)
def test_the_library_computes_the_same(dialect: Dialect, models: Models) -> None:
    """timm's model and the dialect's own, the same images: libraries that are not installed are skipped, and said."""
    model = fitting(dialect, models)
    source = source_of(model, dialect)
    there = write(source, dialect)
    try:
        proof = prove(lambda: model, lambda: dialect.model(source.spec, there), source.spec)
    except MissingLibraryError as reason:
        pytest.skip(f"not proved: {reason}")
    assert proof.difference <= TOLERANCE * proof.scale and proof.scale > 0.1


def test_a_model_of_torchvision_comes_over_whole() -> None:
    """Its own state, buffers and all, into timm and back."""
    from torchvision.models.swin_transformer import SwinTransformer as Theirs

    theirs = drawn(Theirs([2, 2], 16, [2, 2, 1, 1], [2, 4, 4, 4], [2, 2], num_classes=5))
    state = theirs.state_dict()
    source = read(state)
    assert source.dialect.name == "torchvision" and len(source.derived) == 6
    ours = build_stock(source.spec)
    ours.load_state_dict(source.pivot)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-6)
    assert same(write(source, source.dialect), state)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "ViTModel", "SwinForImageClassification", "SwinModel"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_comes_over_whole(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name.startswith("ViT"):
        config = transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128, image_size=32,
            patch_size=8, num_labels=5, layer_norm_eps=1e-6,
        )  # fmt: skip
    else:
        config = transformers.SwinConfig(
            embed_dim=16, depths=[2, 2, 1, 1], num_heads=[2, 4, 4, 4], image_size=32, patch_size=2, window_size=2,
            num_labels=5,
        )  # fmt: skip
    theirs = drawn(getattr(transformers, name)(config))
    state = theirs.state_dict()
    source = read(state)
    version = transformers.__version__.partition(".")[0]
    bare = "-bare" if name.endswith("Model") else ""
    assert source.dialect.name == ("huggingface" if version == "5" else "huggingface4") + bare
    assert set(source.dropped) == ({"pooler.dense.weight", "pooler.dense.bias"} if name == "ViTModel" else set())
    ours = build_stock(source.spec)
    ours.load_state_dict(source.pivot)
    images = torch.randn(2, 3, *source.spec.image)
    theirs_out = huggingface.DIALECTS[0].library.call(theirs, images)
    if name == "ViTModel":
        theirs_out = theirs(images).last_hidden_state[:, 0]
    torch.testing.assert_close(ours(images), theirs_out, rtol=1e-5, atol=1e-5)
    assert same(write(source, source.dialect), {k: v for k, v in state.items() if k not in source.dropped})


# ---- keys written by hand --------------------------------------------------------------------------------


def test_microsoft_by_hand() -> None:
    """The keys of models/swin_transformer.py for two stages of two blocks and one, and where four tensors go."""
    model = drawn(SwinTransformer(img_size=16, patch_size=2, embed_dim=8, depths=(2, 1), num_heads=(1, 2),
                                  window_size=4, num_classes=3))  # fmt: skip
    timms = model.state_dict()
    theirs = convert_state(timms, "microsoft")
    block = ["norm1.weight", "norm1.bias", "attn.relative_position_bias_table", "attn.relative_position_index",
             "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias",
             "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]  # fmt: skip
    expected = {
        "patch_embed.proj.weight", "patch_embed.proj.bias", "patch_embed.norm.weight", "patch_embed.norm.bias",
        *(f"layers.0.blocks.0.{name}" for name in block), *(f"layers.0.blocks.1.{name}" for name in block),
        "layers.0.blocks.1.attn_mask", "layers.0.downsample.reduction.weight", "layers.0.downsample.norm.weight",
        "layers.0.downsample.norm.bias", *(f"layers.1.blocks.0.{name}" for name in block), "norm.weight", "norm.bias",
        "head.weight", "head.bias",
    }  # fmt: skip
    assert set(theirs) == expected
    for their_key, key in [("layers.0.downsample.norm.weight", "layers.1.downsample.norm.weight"),
                           ("head.weight", "head.fc.weight"), ("norm.bias", "norm.bias"),
                           ("layers.0.blocks.1.attn.qkv.weight", "layers.0.blocks.1.attn.qkv.weight")]:  # fmt: skip
        assert torch.equal(theirs[their_key], timms[key])
    assert torch.equal(theirs["layers.0.blocks.0.attn.relative_position_index"], get_relative_position_index(4, 4))
    mask = model.layers[0].blocks[1].get_attn_mask(device="cpu", dtype=torch.float32)
    assert torch.equal(theirs["layers.0.blocks.1.attn_mask"], mask)


def test_files_of_microsoft_without_buffers_are_read_too(models: Models) -> None:
    state = models["swin"].state_dict()
    theirs = convert_state(state, "microsoft")
    stripped = {k: v for k, v in theirs.items() if "attn_mask" not in k and "position_index" not in k}
    assert same(convert_state({"model": stripped}, "timm"), state)


def test_buffers_that_the_architecture_does_not_give_are_refused(models: Models) -> None:
    theirs = convert_state(models["swin"].state_dict(), "microsoft")
    key = "layers.0.blocks.1.attn.relative_position_index"
    with pytest.raises(InputError, match=r"layers\.0\.blocks\.1\.attn\.relative_position_index: not what images of 32"):
        convert_state({**theirs, key: theirs[key].flip(0)}, "timm")
    with pytest.raises(InputError, match=r"attn_mask: not what"):
        convert_state({**theirs, "layers.0.blocks.0.attn_mask": torch.zeros(1)}, "timm")


HF_BLOCK = {  # timm's name of the part, transformers 5's, transformers 4's: ViT, Swin
    "norm1.bias": ("layernorm_before.bias",) * 3,
    "attn.proj.weight": ("attention.o_proj.weight", "attention.output.dense.weight", "attention.output.dense.weight"),
    "mlp.fc1.bias": ("mlp.fc1.bias", "intermediate.dense.bias", "intermediate.dense.bias"),
    "mlp.fc2.weight": ("mlp.fc2.weight", "output.dense.weight", "output.dense.weight"),
}  # fmt: skip


@pytest.mark.parametrize(("dialect", "family", "block", "column", "qkv"), [
    ("huggingface", "vit", "vit.layers.1.", 0, ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("huggingface4", "vit", "vit.encoder.layer.1.", 1,
     ("attention.attention.query", "attention.attention.key", "attention.attention.value")),
    ("huggingface", "swin", "swin.encoder.layers.1.blocks.1.", 0,
     ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("huggingface4", "swin", "swin.encoder.layers.1.blocks.1.", 2,
     ("attention.self.query", "attention.self.key", "attention.self.value")),
])  # fmt: skip
def test_hugging_face_by_hand(
    dialect: str, family: str, block: str, column: int, qkv: tuple[str, ...], models: Models
) -> None:
    timms = models[family].state_dict()
    theirs = convert_state(timms, dialect)
    ours = "blocks.1." if family == "vit" else "layers.1.blocks.1."
    for name, columns in HF_BLOCK.items():
        assert torch.equal(theirs[block + columns[column]], timms[ours + name])
    for part, name in zip(timms[f"{ours}attn.qkv.weight"].chunk(3), qkv, strict=True):
        assert torch.equal(theirs[f"{block}{name}.weight"], part)
    head = "head" if family == "vit" else "head.fc"
    assert torch.equal(theirs["classifier.bias"], timms[f"{head}.bias"])
    trunk = "vit" if family == "vit" else "swin"
    assert torch.equal(
        theirs[f"{trunk}.embeddings.patch_embeddings.projection.weight"], timms["patch_embed.proj.weight"]
    )
    assert torch.equal(theirs[f"{trunk}.layernorm.weight"], timms["norm.weight"])
    if family == "swin":
        table = {"huggingface": "relative_position_bias.relative_position_bias_table",
                 "huggingface4": "self.relative_position_bias_table"}[dialect]  # fmt: skip
        assert torch.equal(theirs[f"{block}attention.{table}"], timms[f"{ours}attn.relative_position_bias_table"])
        merged = "swin.encoder.layers.0.downsample.reduction.weight"
        assert torch.equal(theirs[merged], timms["layers.1.downsample.reduction.weight"])


def test_mmpretrain_by_hand(models: Models) -> None:
    plain, stages = models["vit scaled"].state_dict(), models["swin"].state_dict()
    theirs, theirs_stages = convert_state(plain, "mmpretrain"), convert_state(stages, "mmpretrain")
    for their_key, key in {
        "backbone.cls_token": "cls_token", "backbone.patch_embed.projection.bias": "patch_embed.proj.bias",
        "backbone.layers.1.ln1.weight": "blocks.1.norm1.weight", "backbone.layers.1.ln2.bias": "blocks.1.norm2.bias",
        "backbone.layers.1.attn.gamma1.weight": "blocks.1.ls1.gamma",
        "backbone.layers.0.attn.qkv.bias": "blocks.0.attn.qkv.bias",
        "backbone.layers.0.ffn.layers.0.0.weight": "blocks.0.mlp.fc1.weight",
        "backbone.layers.0.ffn.layers.1.bias": "blocks.0.mlp.fc2.bias",
        "backbone.layers.0.ffn.gamma2.weight": "blocks.0.ls2.gamma", "backbone.ln1.weight": "norm.weight",
        "head.layers.head.weight": "head.weight",
    }.items():  # fmt: skip
        assert torch.equal(theirs[their_key], plain[key])
    for their_key, key in {
        "backbone.patch_embed.norm.bias": "patch_embed.norm.bias", "backbone.norm3.weight": "norm.weight",
        "backbone.stages.1.blocks.1.attn.w_msa.relative_position_bias_table":
            "layers.1.blocks.1.attn.relative_position_bias_table",
        "backbone.stages.0.blocks.1.ffn.layers.1.weight": "layers.0.blocks.1.mlp.fc2.weight",
        "head.fc.bias": "head.fc.bias",
    }.items():  # fmt: skip
        assert torch.equal(theirs_stages[their_key], stages[key])


def test_mmpretrain_merges_patches_by_unfold(models: Models) -> None:
    """A merging written with nn.Unfold, as mmcv's, with the converted tensors gives what timm's gives; with the
    unconverted it does not."""
    state = models["swin"].state_dict()
    theirs = convert_state(state, "mmpretrain")
    merging = PatchMerging(16, 32)
    merging.load_state_dict(
        {k: state[f"layers.1.downsample.{k}"] for k in ("norm.weight", "norm.bias", "reduction.weight")}
    )
    x = torch.randn(2, 6, 8, 16)  # B, H, W, C

    def unfolded(p: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
        y = torch.nn.Unfold(2, stride=2)(x.permute(0, 3, 1, 2)).transpose(1, 2)  # B, H/2 W/2, (C dy dx)
        y = F.layer_norm(y, (64,), p[f"{prefix}.norm.weight"], p[f"{prefix}.norm.bias"])
        return F.linear(y, p[f"{prefix}.reduction.weight"])

    expected = merging(x).flatten(1, 2)
    torch.testing.assert_close(unfolded(theirs, "backbone.stages.0.downsample"), expected)
    assert (unfolded(state, "layers.1.downsample") - expected).abs().max() > 0.01


def test_a_wrong_permutation_does_not_pass(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right keys and shapes, wrong order of merged channels: only the proof sees it."""
    model = models["swin"]
    source = read(model.state_dict())
    wrong = dict(source.pivot)
    key = "layers.1.downsample.reduction.weight"
    wrong[key] = UNFOLD.back((wrong[key],), [None])[0]

    def broken() -> Any:
        other = build_stock(source.spec)
        other.load_state_dict(wrong)
        return other

    with pytest.raises(InputError, match=r"not equal: max \|difference\|"):
        prove(lambda: model, broken, source.spec)


def test_outputs_of_zeros_prove_nothing(models: Models) -> None:
    model = models["vit"]
    source = read(model.state_dict())
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    with pytest.raises(MissingLibraryError, match="all zero"):
        prove(lambda: model, lambda: model, source.spec)


# ---- detection and architecture --------------------------------------------------------------------------


def test_unknown_and_ambiguous_keys_are_one_error(models: Models) -> None:
    with pytest.raises(InputError, match=r"unknown dialect with the keys conv1\.weight; .*\(torchvision\)"):
        detect({"conv1.weight"})
    with pytest.raises(InputError, match="several dialects: timm, mmpretrain-bare"):
        detect([*models["vit"].state_dict(), "layers.0.ln1.weight"])
    with pytest.raises(InputError, match=r"unknown dialect 'torchvison'; did you mean 'torchvision'\?"):
        convert_state(models["swin"].state_dict(), "torchvison")
    with pytest.raises(InputError, match="microsoft has no vit models; expected one of timm"):
        convert_state(models["vit"].state_dict(), "microsoft")


@pytest.mark.parametrize(("dialect", "left"), [
    ("huggingface", r"blocks\.0\.ls1\.gamma"), ("huggingface4-bare", r"head\.weight, head\.bias"),
])  # fmt: skip
def test_what_a_dialect_has_no_place_for_is_named(dialect: str, left: str, models: Models) -> None:
    model = models["vit scaled" if "ls1" in left else "vit"]
    with pytest.raises(InputError, match=f"{dialect}: no place for {left}"):
        convert_state(model.state_dict(), dialect)


@pytest.mark.parametrize("name", [
    "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "deit_small_patch16_224", "deit_base_patch16_384", "vit_large_patch16_224", "vit_huge_patch14_224",
        "vit_so400m_patch14_siglip_gap_224", "swin_base_patch4_window12_384"))
])  # fmt: skip
def test_published_architectures_are_read_off_their_shapes(name: str) -> None:
    model = create(name, meta=True)
    shapes = infer("swin" if name.startswith("swin") else "vit", model.state_dict()).spec
    of_model = read_model(model)
    trunk = replace(of_model.trunk, **{"dynamic_img_size": False})
    assert (shapes.trunk, shapes.canonical().mixer, shapes.mlp) == (trunk, of_model.canonical().mixer, of_model.mlp)
    assert (shapes.img_size, shapes.num_classes) == (of_model.img_size, of_model.num_classes)


def test_registers_pooling_and_images_are_read_off_the_shapes() -> None:
    for more in ({"reg_tokens": 4, "no_embed_class": True}, {"reg_tokens": 2}, {"global_pool": "avg"},
                 {"class_token": False, "global_pool": "avg", "fc_norm": False}, {"qk_norm": True},
                 {"qkv_bias": False, "proj_bias": False, "mlp_ratio": 2.5}, {"pre_norm": True},
                 {"img_size": (32, 32), "in_chans": 1, "no_embed_class": True}):  # fmt: skip
        model = VisionTransformer(**PLAIN | more)
        source = read(model.state_dict())
        assert build_stock(source.spec).state_dict().keys() == model.state_dict().keys()
    with pytest.raises(InputError, match="pos_embed has 7 positions"):
        read(VisionTransformer(**PLAIN | {"img_size": (16, 24)}).state_dict())
    oblong = VisionTransformer(**PLAIN | {"img_size": (16, 24)}).state_dict()
    assert read(oblong, lambda family, pivot: infer(family, pivot, (16, 24))).spec.stages[0].grid == (2, 3)
    assert "square images" in read(VisionTransformer(**PLAIN | {"img_size": (16, 64)}).state_dict()).assumed


def test_wrong_families_and_images_are_refused(models: Models) -> None:
    plain, stages = read(models["vit"].state_dict()), read(models["swin"].state_dict())
    with pytest.raises(InputError, match="those of a vit model"):
        read(models["vit"].state_dict(), lambda *_: Inferred(stages.spec))
    with pytest.raises(ValueError, match=r"img_size=\(30, 32\).*divisible by the patch"):
        replace(plain.spec, img_size=(30, 32))
    with pytest.raises(InputError, match="the shapes do not tell the model"):
        infer("vit", {"patch_embed.proj.weight": torch.ones(3)})


@pytest.mark.parametrize(("side", "pads"), [(32, ""), (28, "mmpretrain")])
def test_windows_that_do_not_fill_the_grid_keep_the_librarys_numbers(side: int, pads: str) -> None:
    """torchvision pads before it rolls: our record says so, timm's model would not compute the same."""
    from torchvision.models.swin_transformer import SwinTransformer as Theirs

    theirs = drawn(Theirs([2, 2], 16, [2, 2, 2], [2, 4, 4], [4, 4], num_classes=5)).double()

    def describe(family: Any, pivot: Any) -> Inferred:
        return infer(family, pivot, (side, side))

    source = read(theirs.state_dict(), describe)
    backbone = with_state(source.spec, convert_state(theirs.state_dict(), "kernelbank", describe))
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(backbone(images), theirs(images), rtol=1e-9, atol=1e-9)
    assert pads in (source.spec.mixer or "")
    if pads:
        timms = build_stock(source.spec).double()
        timms.load_state_dict(source.pivot)
        assert (timms(images) - theirs(images)).abs().max() > 1e-4


def test_timm_takes_what_is_written_for_it(models: Models) -> None:
    theirs = convert_state(models["swin"].state_dict(), "torchvision")
    model = timm.create_model("swin_tiny_patch4_window7_224", **STAGES)
    model.load_state_dict(convert_state(theirs, "timm"), strict=True)


def test_windows_that_a_library_pads_otherwise_are_refused() -> None:
    """timm's padding has no place in mmpretrain, whether or not it is installed to compare the outputs."""
    model = drawn(SwinTransformer(**STAGES | {"img_size": 28, "window_size": 4}))
    source = read(dict(model.state_dict()), lambda *_: Inferred(read_model(model)))
    for to in ("mmpretrain", "huggingface", "torchvision"):
        with pytest.raises(InputError, match=rf"{to}: invalid mixer=.*timm.* on the grid \(14, 14\).*pad=mmpretrain"):
            write(source, named(to, "swin"))
    assert write(source, named("timm", "swin")).keys() == model.state_dict().keys()
    assert convert_state(drawn(SwinTransformer(**STAGES)).state_dict(), "mmpretrain")
