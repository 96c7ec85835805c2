"""The atlas: every known token mixer as one row of text cells, with its citation and published figures.

A method of the literature is a row: nothing is computed here. The grammar of the cells is in `spec`, which reads
these rows (a record's text starts with a row's name). Below them the skeletons, and the models that are registered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kernelbank.errors import SpecError


@dataclass(frozen=True)
class Published:
    """A figure that the cited source states for a whole model; `macs` are multiply-adds in G at 224 x 224,
    `params` are millions, `top1` is per cent on ImageNet-1K. None where the source states none."""

    model: str
    params: float | None
    macs: float | None
    top1: float | None
    source: str


@dataclass(frozen=True)
class Row:
    """One row of the paper's table 1, extended: eight cells as text (bias is True in every row)."""

    title: str
    bank: str
    support: str
    mix: str
    kernel: str
    size: str
    activation: str
    position: str
    frame: str
    cite: str
    published: tuple[Published, ...] = ()
    note: str = ""

    @property
    def cells(self) -> dict[str, str]:
        """The row's cells by field, as text."""
        fields = ("bank", "support", "mix", "kernel", "size", "activation", "position", "frame")
        return {field: getattr(self, field) for field in fields} | {"bias": "True"}


PAPER = "Zhou, Loy, Dai: Interpret Vision Transformers as ConvNets with Dynamic Convolutions, arXiv 2309.10713"

_DEIT = "facebookresearch/deit README and timm results at aa4b585"
_SWIN = "microsoft/Swin-Transformer README at f82860b"
_VIL = "microsoft/vision-longformer README, ViL-Small skeleton"
_TIMM = "timm results-imagenet at aa4b585"
_DWN = "Atten4Vis/DemystifyLocalViT README at ce7c0b7"

ROWS: dict[str, Row] = {
    "vit": Row(
        title="self-attention of ViT and DeiT",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="none", frame="linear",
        cite="Dosovitskiy et al., arXiv 2010.11929; Touvron et al., arXiv 2012.12877",
        published=(
            Published("DeiT-Ti", 5.72, 1.26, 72.2, _DEIT),
            Published("DeiT-S", 22.05, 4.61, 79.9, _DEIT),
            Published("DeiT-B", 86.57, 17.58, 81.8, _DEIT),
        ),
        note="DeiT-S is 79.9 in one published recipe and 80.69 in another (MMClassification): compare in one recipe",
    ),
    "vit_relpos": Row(
        title="self-attention with a relative position bias",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="relative", frame="linear",
        cite="Shaw et al., arXiv 1803.02155; Liu et al., arXiv 2103.14030",
        note="study 1 of the paper changes the activation of this row and of swin",
    ),
    "swin": Row(
        title="shifted-window self-attention of Swin",
        bank="dynamic", support="window(7, alternate)", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="relative", frame="linear",
        cite="Liu et al., arXiv 2103.14030",
        published=(
            Published("Swin-T", 28.29, 4.5, 81.2, _SWIN),
            Published("Swin-S", 49.61, 8.7, 83.2, _SWIN),
            Published("Swin-B", 87.77, 15.4, 83.5, _SWIN),
        ),
    ),
    "linformer": Row(
        title="self-attention over r learned mixtures of the kernels",
        bank="dynamic", support="all", mix="project(64)", kernel="two_step",
        size="1", activation="softmax", position="none", frame="linear",
        cite="Wang et al., arXiv 2006.04768",
        published=(Published("ViL-Small with linformer", 26.3, 5.62, 81.0, _VIL),),
        note="lucidrains' linformer has no bias on q, k, v: write `linformer bias=False`",
    ),
    "nat": Row(
        title="neighborhood attention",
        bank="dynamic", support="neighborhood(7)", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="relative", frame="linear",
        cite="Hassani et al., arXiv 2204.07143",
        published=(
            Published("NAT-Mini", 20.0, 2.7, 81.8, "SHI-Labs/Neighborhood-Attention-Transformer README"),
            Published("NAT-T", 28.0, 4.3, 83.2, "SHI-Labs/Neighborhood-Attention-Transformer README"),
            Published("NAT-S", 51.0, 7.8, 83.7, "SHI-Labs/Neighborhood-Attention-Transformer README"),
        ),
        note="published in a skeleton of its own (overlapping convolutional stem)",
    ),
    "strided_bank": Row(
        title="self-attention whose bank is generated on the 2 x 2 pooled grid",
        bank="dynamic(stride=2)", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="none", frame="linear",
        cite="ours; near PVT, Wang et al., arXiv 2102.12122, which reduces by a strided conv and a norm instead",
    ),
    "relu_attention": Row(
        title="self-attention with ReLU over the number of kernels",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="relu,count", position="none", frame="linear",
        cite="Wortsman et al., arXiv 2309.08586",
    ),
    "sigmoid_attention": Row(
        title="self-attention with a sigmoid of the logit minus log n",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="log_count,sigmoid", position="none", frame="linear",
        cite="Ramapuram et al., arXiv 2409.04431",
    ),
    "layernorm_attention": Row(
        title="self-attention with LayerNorm over the kernels in place of softmax",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="layernorm,count", position="relative", frame="linear",
        cite=PAPER + ", section 5.2",
        note="the scale after LayerNorm is ours (1/n): the paper states none",
    ),
    "identity_attention": Row(
        title="self-attention without an activation: the two kernels fuse into one",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="identity,count", position="relative", frame="linear",
        cite=PAPER + ", section 5.3",
        note="the scale is ours (1/n): the paper states none",
    ),
    "dwsa": Row(
        title="depth-wise self-attention",
        bank="dynamic", support="all", mix="mean", kernel="depthwise",
        size="1", activation="none", position="relative", frame="linear",
        cite=PAPER + ", section 5.3",
        note="the output projection is kept: the paper does not say",
    ),
    "dwsa_window": Row(
        title="depth-wise self-attention in shifted windows",
        bank="dynamic", support="window(7, alternate)", mix="mean", kernel="depthwise",
        size="1", activation="none", position="relative", frame="linear",
        cite=PAPER + ", section 5.3",
    ),
    "dconv": Row(
        title="dynamic convolution: predicted coefficients mix K kernels into one",
        bank="static(4)", support="all", mix="predict(softmax, tau=1, r=4)", kernel="full",
        size="3", activation="none", position="none", frame="bare",
        cite="Chen et al., arXiv 1912.03458",
        note="tau is annealed from 30 to 1 in training; tau of the record is the evaluation value",
    ),
    "condconv": Row(
        title="conditionally parameterised convolution",
        bank="static(8)", support="all", mix="predict(sigmoid)", kernel="full",
        size="3", activation="none", position="none", frame="bare",
        cite="Yang et al., arXiv 1904.04971",
        published=(
            Published("EfficientNet-CC-B0-4e", 13.31, 0.41, 77.32, _TIMM),
            Published("EfficientNet-CC-B0-8e", 24.01, 0.42, 77.96, _TIMM),
            Published("EfficientNet-CC-B1-8e", 39.72, 0.75, 79.32, _TIMM),
        ),
        note="published with one routing vector per residual block, in the last three stages",
    ),
    "condconv_dw": Row(
        title="conditionally parameterised depth-wise convolution",
        bank="static(8)", support="all", mix="predict(sigmoid)", kernel="depthwise",
        size="3", activation="none", position="none", frame="bare",
        cite="Yang et al., arXiv 1904.04971",
    ),
    "ddwconv": Row(
        title="dynamic depth-wise convolution, one kernel per image",
        bank="dynamic(4)", support="all", mix="pool", kernel="depthwise",
        size="7", activation="none", position="none", frame="bn_relu",
        cite="Han et al., arXiv 2106.04263",
        published=(
            Published("dynamic DWNet-T", 51.0, 3.8, 81.8, _DWN),
            Published("dynamic DWNet-B", 162.0, 13.0, 83.2, _DWN),
        ),
    ),
    "iddwconv": Row(
        title="dynamic depth-wise convolution, one kernel per position",
        bank="dynamic(4)", support="self", mix="mean", kernel="grouped(32)",
        size="7", activation="none", position="none", frame="bn_relu",
        cite="Han et al., arXiv 2106.04263",
    ),
    "involution": Row(
        title="involution: a kernel per position, shared by 16 channels",
        bank="dynamic(4)", support="self", mix="mean", kernel="grouped(C/16)",
        size="7", activation="none", position="none", frame="bare",
        cite="Li et al., arXiv 2103.06255",
        published=(
            Published("RedNet-26", 9.23, 1.73, 75.96, "d-li14/involution README"),
            Published("RedNet-50", 15.54, 2.71, 78.35, "d-li14/involution README"),
            Published("RedNet-101", 25.65, 4.74, 78.92, "d-li14/involution README"),
        ),
        note="published with a BatchNorm inside the generator",
    ),
    "se": Row(
        title="squeeze-and-excitation",
        bank="dynamic(16, sigmoid)", support="all", mix="pool", kernel="depthwise",
        size="1", activation="none", position="none", frame="bare",
        cite="Hu et al., arXiv 1709.01507",
    ),
    "external_attention": Row(
        title="external attention, its core: a static bank of 64 keys and values",
        bank="static(64)", support="all", mix="stack", kernel="two_step(1)",
        size="1", activation="softmax@positions,l1", position="none", frame="linear",
        cite="Guo et al., arXiv 2105.02358",
    ),
    "ffn": Row(
        title="the feed-forward network: a static bank of 4C keys and values",
        bank="static(4C)", support="all", mix="stack", kernel="two_step(1)",
        size="1", activation="gelu", position="none", frame="bare",
        cite="Vaswani et al., arXiv 1706.03762; Dosovitskiy et al., arXiv 2010.11929",
    ),
    "conv": Row(
        title="static convolution",
        bank="static(1)", support="all", mix="mean", kernel="full",
        size="3", activation="none", position="none", frame="bare",
        cite="LeCun et al., Proceedings of the IEEE 86 (1998)",
    ),
    "dwconv": Row(
        title="static depth-wise convolution",
        bank="static(1)", support="all", mix="mean", kernel="depthwise",
        size="7", activation="none", position="none", frame="bare",
        cite="Chollet, arXiv 1610.02357; Liu et al., arXiv 2201.03545",
        published=(
            Published("ConvNeXt-T", 28.0, 4.5, 82.1, "facebookresearch/ConvNeXt README"),
            Published("ConvNeXt-S (isotropic)", 22.0, 4.3, 78.7, "facebookresearch/ConvNeXt README"),
        ),
    ),
    "dwnet": Row(
        title="static depth-wise convolution of DWNet",
        bank="static(1)", support="all", mix="mean", kernel="depthwise",
        size="7", activation="none", position="none", frame="bn_relu",
        cite="Han et al., arXiv 2106.04263",
        published=(
            Published("DWNet-T", 24.0, 3.8, 81.2, _DWN),
            Published("DWNet-B", 74.0, 12.9, 83.2, _DWN),
        ),
    ),
    "pool": Row(
        title="average pooling minus the input (PoolFormer)",
        bank="box", support="all", mix="mean", kernel="grouped(1)",
        size="3", activation="none", position="none", frame="bare",
        cite="Yu et al., arXiv 2111.11418",
        published=(
            Published("PoolFormer-S12", 11.9, 1.8, 74.6, "sail-sg/poolformer README"),
            Published("PoolFormer-S24", 21.3, 3.4, 78.2, "sail-sg/poolformer README"),
        ),
    ),
    "vit3": Row(
        title="self-attention with 3 x 3 dynamic kernels",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="3", activation="softmax", position="none", frame="linear",
        cite=PAPER + ", section 6 (future work)",
    ),
    "dwsa3": Row(
        title="depth-wise self-attention with 3 x 3 dynamic kernels",
        bank="dynamic", support="all", mix="mean", kernel="depthwise",
        size="3", activation="none", position="relative", frame="linear",
        cite=PAPER + ", section 6 (future work)",
    ),
    "swin3": Row(
        title="shifted-window self-attention with 3 x 3 dynamic kernels",
        bank="dynamic", support="window(7, alternate)", mix="stack", kernel="two_step",
        size="3", activation="softmax", position="relative", frame="linear",
        cite=PAPER + ", section 6 (future work)",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Skeleton:
    """A backbone without its mixers: one stage is plain (ViT), several are hierarchical (Swin). Stages i and
    i + 1 are joined by a patch merging that halves the grid and doubles the channels; `depths` and `num_heads` are
    by stage, `dim` is the width of the first.

    `pos_embed` ``learn`` adds a learned embedding of every position and prefix token after the patch embedding. The
    prefix is a class token, if there is one, and the registers; without a class token the grid is averaged.

    Raises SpecError for lists of different lengths, and for prefix tokens or a position embedding in several stages.
    """

    patch_size: int
    dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    class_token: bool = False
    pos_embed: Literal["learn", "none"] = "none"
    reg_tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads):
            raise SpecError(f"num_heads={self.num_heads} is not legal; legal: one for each stage of {self.depths}")
        if self.hierarchical and self.prefix:
            raise SpecError(f"{self.prefix} prefix tokens are not legal in {len(self.depths)} stages: patch merging "
                            "joins grid positions; legal: class_token=False, reg_tokens=0")  # fmt: skip
        if self.hierarchical and self.pos_embed != "none":
            raise SpecError(f"pos_embed={self.pos_embed!r} is not legal in {len(self.depths)} stages; legal: 'none'")

    @property
    def hierarchical(self) -> bool:
        """Whether there are several stages."""
        return len(self.depths) > 1

    @property
    def dims(self) -> tuple[int, ...]:
        """The channels of each stage."""
        return tuple(self.dim * 2**stage for stage in range(len(self.depths)))

    @property
    def prefix(self) -> int:
        """The tokens before the grid."""
        return self.class_token + self.reg_tokens

    def stages(self, img_size: tuple[int, int]) -> tuple[Stage, ...]:
        """The stages for images of H x W pixels; merging pads odd sides. Raises SpecError for an image that the
        patches do not fill."""
        patch = self.patch_size
        if any(side < 1 or side % patch for side in img_size):
            raise SpecError(f"img_size={img_size} is not legal; legal: sides divisible by the patch {(patch, patch)}")
        height, width = (side // patch for side in img_size)
        return tuple(
            Stage(dim, depth, heads, (-(-height // 2**i), -(-width // 2**i)), self.prefix)
            for i, (dim, depth, heads) in enumerate(zip(self.dims, self.depths, self.num_heads, strict=True))
        )


@dataclass(frozen=True)
class Stage:
    """Blocks at one resolution: `dim` channels, `num_heads` heads, on a `grid` after `prefix` tokens."""

    dim: int
    depth: int
    num_heads: int
    grid: tuple[int, int]
    prefix: int


# Sizes for images of 8 x 8 pixels: ours, so small that a study of 72 runs takes minutes on two CPU cores. Both start
# from a 4 x 4 grid of 2 x 2 patches: a LayerNorm after a patch of one grey pixel would keep only its sign. The plain
# one has absolute positions as ViT and DeiT do, the hierarchical one none, as Swin.
SKELETONS: dict[str, Skeleton] = {
    "plain": Skeleton(patch_size=2, dim=48, depths=(2,), num_heads=(4,), pos_embed="learn"),
    "hierarchical": Skeleton(patch_size=2, dim=32, depths=(2, 1), num_heads=(2, 4)),
}


@dataclass(frozen=True)
class Model:
    """A registered model: a skeleton, the records it holds unless told otherwise, its image side in pixels, and the
    name of the published figure it stands beside, if there is one."""

    skeleton: Skeleton
    mixer: str
    mlp: str = "ffn"
    img_size: int = 224
    published: str | None = None

    @property
    def figure(self) -> Published | None:
        """What the source of the model states for it."""
        figures = {figure.model: figure for row in ROWS.values() for figure in row.published}
        return None if self.published is None else figures[self.published]


def _deit(dim: int) -> Skeleton:
    """DeiT (Touvron et al., arXiv 2012.12877): 64 channels a head."""
    return Skeleton(16, dim, (12,), (dim // 64,), class_token=True, pos_embed="learn")


def _swin(dim: int, third: int) -> Skeleton:
    """Swin (Liu et al., arXiv 2103.14030): 32 channels a head."""
    return Skeleton(4, dim, (2, 2, third, 2), tuple(dim * 2**stage // 32 for stage in range(4)))


_DEIT_LETTER = {"tiny": "Ti", "small": "S", "base": "B"}
_SWIN_LETTER = {"tiny": "T", "small": "S", "base": "B"}
_DEIT_SIZES = {"tiny": _deit(192), "small": _deit(384), "base": _deit(768)}
_SWIN_SIZES = {"tiny": _swin(96, 6), "small": _swin(96, 18), "base": _swin(128, 18)}
# The paper's relative position is defined on the grid alone (systems.md 5.1): no class token, no absolute position.
_GRID_SIZES = {size: replace(skeleton, class_token=False, pos_embed="none") for size, skeleton in _DEIT_SIZES.items()}
_SMALL_PLAIN = Skeleton(16, 64, (3,), (2,), class_token=True, pos_embed="learn")
_SMALL_GRID = replace(_SMALL_PLAIN, class_token=False, pos_embed="none")
_SMALL_STAGES = Skeleton(4, 16, (1, 2, 1, 2), (1, 2, 4, 8))

# `import kernelbank.models` registers these with timm. Sizes named `test` are for tests: 64 x 64 pixels.
MODELS: dict[str, Model] = {
    **{
        f"vit_kb_{size}_patch16_224": Model(skeleton, "vit", published=f"DeiT-{_DEIT_LETTER[size]}")
        for size, skeleton in _DEIT_SIZES.items()
    },
    **{f"vit_linformer_{size}_patch16_224": Model(skeleton, "linformer") for size, skeleton in _DEIT_SIZES.items()},
    **{f"vit_dwsa_{size}_patch16_224": Model(skeleton, "dwsa") for size, skeleton in _GRID_SIZES.items()},
    **{
        f"swin_kb_{size}_patch4_window7_224": Model(skeleton, "swin", published=f"Swin-{_SWIN_LETTER[size]}")
        for size, skeleton in _SWIN_SIZES.items()
    },
    **{
        f"swin_dwsa_{size}_patch4_window7_224": Model(skeleton, "dwsa_window") for size, skeleton in _SWIN_SIZES.items()
    },
    "dwnet_tiny": Model(_SWIN_SIZES["tiny"], "dwnet", published="DWNet-T"),
    "dwnet_base": Model(_SWIN_SIZES["base"], "dwnet", published="DWNet-B"),
    "vit_kb_test_patch16_64": Model(_SMALL_PLAIN, "vit", img_size=64),
    "vit_linformer_test_patch16_64": Model(_SMALL_PLAIN, "linformer mix=project(8)", img_size=64),
    "vit_dwsa_test_patch16_64": Model(_SMALL_GRID, "dwsa", img_size=64),
    "swin_kb_test_patch4_window7_64": Model(_SMALL_STAGES, "swin", img_size=64),
    "swin_dwsa_test_patch4_window7_64": Model(_SMALL_STAGES, "dwsa_window", img_size=64),
    "dwnet_test": Model(_SMALL_STAGES, "dwnet", img_size=64),
}
