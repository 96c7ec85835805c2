"""The atlas: every known token mixer as one row of text cells, with its citation and published figures.

A method of the literature is a row: nothing is computed here. The grammar of the cells is in `spec`, which reads
these rows: the text of a spec starts with the name of a row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """What the cited source states for a whole model: `params` in millions, `macs` in billions of multiply-adds at
    224 x 224 pixels, `top1` in per cent on ImageNet-1K. None where the source states no value."""

    model: str
    params: float | None
    macs: float | None
    top1: float | None
    source: str


@dataclass(frozen=True)
class Row:
    """A row of the paper's table 1, which is extended: eight cells as text (bias is True in every row)."""

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
_VIL = "microsoft/vision-longformer README, ViL-Small trunk"
_MAXVIT = "google-research/maxvit README at 127a2b1"
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
        note="DeiT-S reaches 79.9 with one published recipe, 80.69 with MMClassification's: compare within one recipe",
    ),
    "vit_relpos": Row(
        title="self-attention with a relative position bias",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="relative", frame="linear",
        cite="Shaw et al., arXiv 1803.02155; Liu et al., arXiv 2103.14030",
        note="study 1 of the paper changes the activation of this row and of swin",
    ),
    "vit_qk_norm": Row(
        title="self-attention with a LayerNorm of queries and keys per head",
        bank="dynamic", support="all", mix="stack", kernel="two_step(norm=layernorm)",
        size="1", activation="softmax", position="none", frame="linear",
        cite="Dehghani et al., arXiv 2302.05442",
        note="`norm=rmsnorm` is that of recent models",
    ),
    "vit_rope": Row(
        title="self-attention with axial rotary position embedding",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="rope(100, axes=xy)", frame="linear",
        cite="Heo et al., arXiv 2403.13298; Su et al., arXiv 2104.09864",
        note="EVA-02 has `position=rope(10000, side=16)`, and no bias on k",
    ),
    "dinov3": Row(
        title="self-attention of DINOv3: rotations by the place on an image from -1 to 1",
        bank="dynamic", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="rope(100, half, unit)", frame="linear",
        cite="Simeoni et al., arXiv 2508.10104",
        note="published without a bias on k",
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
    "swin_v2": Row(
        title="shifted-window self-attention of Swin V2: cosines times a learned scale",
        bank="dynamic", support="window(8, alternate)", mix="stack", kernel="two_step(norm=l2, scale=learned)",
        size="1", activation="softmax", position="relative", frame="linear",
        cite="Liu et al., arXiv 2111.09883",
        note="published with a relative table computed by an MLP, and without a bias on k",
    ),
    "maxvit_grid": Row(
        title="grid attention of MaxViT: 7 x 7 positions spread over the whole grid",
        bank="dynamic", support="grid(7)", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="relative", frame="linear",
        cite="Tu et al., arXiv 2204.01697",
        published=(
            Published("MaxViT-T", 31.0, 5.6, 83.62, _MAXVIT),
            Published("MaxViT-S", 69.0, 11.7, 84.45, _MAXVIT),
            Published("MaxViT-B", 119.0, 24.2, 84.95, _MAXVIT),
        ),
        note="published in turns with windows, after convolutions; MobileViT's is `vit support=grid(M)`, M = H / 2",
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
        note="published in a trunk of its own, with an overlapping convolutional stem",
    ),
    "strided_bank": Row(
        title="self-attention whose bank is generated on the 2 x 2 pooled grid",
        bank="dynamic(stride=2)", support="all", mix="stack", kernel="two_step",
        size="1", activation="softmax", position="none", frame="linear",
        cite="ours; near PVT, Wang et al., arXiv 2102.12122, which reduces by a strided conv and a norm instead",
    ),
    "relu_attention": Row(
        title="self-attention with ReLU divided by the number of kernels",
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
        title="self-attention without an activation, so that the two kernels fuse into one",
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
        note="the output projection is kept; the paper does not state whether",
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
        note="tau is annealed from 30 to 1 in training; the tau of the spec is that of evaluation",
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
        title="core of external attention: a static bank of 64 keys and values",
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
