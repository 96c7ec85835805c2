"""The models with a name: sizes, mixers and the published figures they stand beside. Imports no torch.

``import kernelbank.models`` registers `MODELS` with timm; `SMALL` are for images of 8 x 8 pixels, `THUMBNAIL` for
images of 32 x 32, and both are named in ``kernelbank train`` and ``study`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from kernelbank.atlas import ROWS, Published
from kernelbank.errors import SpecError
from kernelbank.model import ModelSpec, SwinTrunk, Trunk, ViTTrunk
from kernelbank.text import suggest

# ---- trunks ----------------------------------------------------------------------------------------------


def deit(dim: int, *, on_grid_alone: bool = False) -> ViTTrunk:
    """DeiT (Touvron et al., arXiv 2012.12877): 64 channels per head. `on_grid_alone` leaves out the class token and
    the position embedding: the paper defines its relative position on the grid alone (docs/assumptions.md)."""
    if on_grid_alone:
        return ViTTrunk(
            embed_dim=dim, num_heads=dim // 64, class_token=False, pos_embed="none", global_pool="avg"
        )  # fmt: skip
    return ViTTrunk(embed_dim=dim, num_heads=dim // 64)


def swin(dim: int, third: int) -> SwinTrunk:
    """Swin (Liu et al., arXiv 2103.14030): 32 channels per head, `third` blocks in the third stage."""
    return SwinTrunk(
        embed_dim=dim, depths=(2, 2, third, 2), num_heads=tuple(dim * 2**stage // 32 for stage in range(4))
    )  # fmt: skip


_DEIT = {"tiny": (192, "Ti"), "small": (384, "S"), "base": (768, "B")}
_SWIN = {"tiny": (96, 6, "T"), "small": (96, 18, "S"), "base": (128, 18, "B")}
_TEST_VIT = ViTTrunk(embed_dim=64, depth=3, num_heads=2)
_TEST_GRID = replace(_TEST_VIT, class_token=False, pos_embed="none", global_pool="avg")
_TEST_SWIN = SwinTrunk(embed_dim=16, depths=(1, 2, 1, 2), num_heads=(1, 2, 4, 8))

# Sizes for images of 8 x 8 pixels, so small that a study of 72 runs takes minutes on two CPU cores. Both start from a
# 4 x 4 grid of 2 x 2 patches: a LayerNorm after a patch of one grey pixel would keep only its sign. The first has
# absolute positions as ViT and DeiT do, the second none, as Swin.
_DIGITS_VIT = ViTTrunk(
    patch_size=(2, 2), embed_dim=48, depth=2, num_heads=4, class_token=False, pos_embed="learn", global_pool="avg"
)  # fmt: skip
_DIGITS_SWIN = SwinTrunk(patch_size=(2, 2), embed_dim=32, depths=(2, 1), num_heads=(2, 4))

# ---- models ----------------------------------------------------------------------------------------------


def _models() -> dict[str, ModelSpec]:
    vits = {size: deit(dim) for size, (dim, _) in _DEIT.items()}
    grids = {size: deit(dim, on_grid_alone=True) for size, (dim, _) in _DEIT.items()}
    swins = {size: swin(dim, third) for size, (dim, third, _) in _SWIN.items()}
    families: dict[str, tuple[Mapping[str, Trunk], str]] = {
        "vit_kb_{}_patch16_224": (vits, "vit"),
        "vit_linformer_{}_patch16_224": (vits, "linformer"),
        "vit_dwsa_{}_patch16_224": (grids, "dwsa"),
        "swin_kb_{}_patch4_window7_224": (swins, "swin"),
        "swin_dwsa_{}_patch4_window7_224": (swins, "dwsa_window"),
        "dwnet_{}": ({size: swins[size] for size in ("tiny", "base")}, "dwnet"),
    }
    models = {
        pattern.format(size): ModelSpec(trunk=trunk, mixer=mixer, mlp="ffn", img_size=(224, 224))
        for pattern, (trunks, mixer) in families.items()
        for size, trunk in trunks.items()
    }
    tests: dict[str, tuple[Trunk, str]] = {
        "vit_kb_test_patch16_64": (_TEST_VIT, "vit"),
        "vit_linformer_test_patch16_64": (_TEST_VIT, "linformer mix=project(8)"),
        "vit_dwsa_test_patch16_64": (_TEST_GRID, "dwsa"),
        "swin_kb_test_patch4_window7_64": (_TEST_SWIN, "swin"),
        "swin_dwsa_test_patch4_window7_64": (_TEST_SWIN, "dwsa_window"),
        "dwnet_test": (_TEST_SWIN, "dwnet"),
    }
    models |= {
        name: ModelSpec(trunk=trunk, mixer=mixer, mlp="ffn", img_size=(64, 64))
        for name, (trunk, mixer) in tests.items()
    }
    return {name: replace(spec, name=name) for name, spec in models.items()}


MODELS: Mapping[str, ModelSpec] = MappingProxyType(_models())
"""Registered with timm. Sizes named ``test`` are for tests."""

SMALL: Mapping[str, ModelSpec] = MappingProxyType({
    "plain": ModelSpec(
        trunk=_DIGITS_VIT, mixer="vit", mlp="ffn", img_size=(8, 8), in_chans=1, num_classes=10, name="plain"
    ),
    "hierarchical": ModelSpec(
        trunk=_DIGITS_SWIN, mixer="swin", mlp="ffn", img_size=(8, 8), in_chans=1, num_classes=10, name="hierarchical"
    ),
})  # fmt: skip
"""For images of 8 x 8 pixels: one stage (ViT) and two stages (Swin)."""

# Sizes for CIFAR-10 on a CPU: 64 positions in both, so that a run is minutes and a study is hours.
_PLAIN32 = ViTTrunk(
    patch_size=(4, 4), embed_dim=64, depth=4, num_heads=4, class_token=False, pos_embed="learn", global_pool="avg"
)
_HIERARCHICAL32 = SwinTrunk(patch_size=(4, 4), embed_dim=48, depths=(2, 2), num_heads=(3, 6))

THUMBNAIL: Mapping[str, ModelSpec] = MappingProxyType({
    "plain32": ModelSpec(trunk=_PLAIN32, mixer="vit", mlp="ffn", img_size=(32, 32), num_classes=10, name="plain32"),
    "hierarchical32": ModelSpec(
        trunk=_HIERARCHICAL32, mixer="swin support=window(4, alternate)", mlp="ffn", img_size=(32, 32), num_classes=10,
        name="hierarchical32",
    ),
})  # fmt: skip
"""For images of 32 x 32 pixels: one stage (ViT) and two stages (Swin)."""

NAMED: Mapping[str, ModelSpec] = MappingProxyType({**MODELS, **SMALL, **THUMBNAIL})

_PUBLISHED = {
    **{f"vit_kb_{size}_patch16_224": f"DeiT-{letter}" for size, (_, letter) in _DEIT.items()},
    **{f"swin_kb_{size}_patch4_window7_224": f"Swin-{letter}" for size, (_, _, letter) in _SWIN.items()},
    "dwnet_tiny": "DWNet-T",
    "dwnet_base": "DWNet-B",
}


def find(name: str) -> ModelSpec:
    """The model of this name. Raises SpecError for an unknown one, naming the nearest."""
    if name not in NAMED:
        raise SpecError(f"unknown model {name!r}{suggest(name, NAMED)}; expected one of {', '.join(NAMED)}")
    return NAMED[name]


def published_figure(name: str) -> Published | None:
    """The figure that the source of the model `name` states for it, or None."""
    figures = {figure.model: figure for row in ROWS.values() for figure in row.published}
    return figures.get(_PUBLISHED.get(name, ""))
