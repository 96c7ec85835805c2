"""What each library calls the tensors of a ViT and a Swin: tables from timm's patterns to its own.

The sources are named at each table; docs/conversion.md tells how to add one.
"""

from __future__ import annotations

from kernelbank.weights.changes import FC1, FC1_BIAS, FC2, TABLE, UNFOLD
from kernelbank.weights.keymap import SAME, Change

Names = dict[str, str | tuple[str, ...]]
"""timm's pattern -> the library's; three where timm has q, k and v in one tensor."""
Changes = dict[str, Change]
"""timm's pattern -> what its tensor becomes."""

# ---- timm: the pivot -------------------------------------------------------------------------------------

_PLAIN_KEYS = (
    "cls_token", "reg_token", "pos_embed", "patch_embed.proj.{p}", "norm_pre.{p}", "blocks.{i}.norm1.{p}",
    "blocks.{i}.attn.qkv.{p}", "blocks.{i}.attn.q_norm.{p}", "blocks.{i}.attn.k_norm.{p}", "blocks.{i}.attn.proj.{p}",
    "blocks.{i}.ls1.gamma", "blocks.{i}.norm2.{p}", "blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.fc2.{p}",
    "blocks.{i}.ls2.gamma", "norm.{p}", "fc_norm.{p}", "head.{p}",
)  # fmt: skip
_STAGE_KEYS = (
    "patch_embed.proj.{p}", "patch_embed.norm.{p}", "layers.{i}.downsample.norm.{p}",
    "layers.{i}.downsample.reduction.weight", "layers.{i}.blocks.{j}.norm1.{p}", "layers.{i}.blocks.{j}.attn.qkv.{p}",
    "layers.{i}.blocks.{j}.attn.proj.{p}", "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
    "layers.{i}.blocks.{j}.norm2.{p}", "layers.{i}.blocks.{j}.mlp.fc1.{p}", "layers.{i}.blocks.{j}.mlp.fc2.{p}",
    "norm.{p}", "head.fc.{p}",
)  # fmt: skip
PLAIN: Names = {key: key for key in _PLAIN_KEYS}
STAGES: Names = {key: key for key in _STAGE_KEYS}
BLOCK, STAGE_BLOCK = "blocks.{i}", "layers.{i}.blocks.{j}"

# ---- ours: the names of `inventory`, in timm's trunk -----------------------------------------------------

_FC = {"fc1": "key", "fc2": "value"}
_FFN = {"fc1.weight": FC1, "fc1.bias": FC1_BIAS, "fc2.weight": FC2, "fc2.bias": SAME}
"""The FFN: one head, and keys and values as kernels of size 1."""


def _ours(timm: Names, block: str) -> Names:
    """`timm` with mixers in `block`: weights and biases of the FFN have rules of their own, as they differ."""
    renamed = {timm: name for timm, name in timm.items() if not timm.startswith(f"{block}.mlp.")}
    renamed[f"{block}.attn.qkv.{{p}}"] = tuple(f"{block}.attn.{name}.{{p}}" for name in ("q", "key", "value"))
    renamed[f"{block}.attn.proj.{{p}}"] = f"{block}.attn.out.{{p}}"
    ffn = {f"{fc}.{kind}": f"{name}.{kind}" for fc, name in _FC.items() for kind in ("weight", "bias")}
    return renamed | {f"{block}.mlp.{theirs}": f"{block}.mlp.{ours}" for theirs, ours in ffn.items()}


_TABLE = f"{STAGE_BLOCK}.attn.relative_position_bias_table"
OURS_PLAIN: Names = _ours(PLAIN, BLOCK)
OURS_STAGES: Names = {**_ours(STAGES, STAGE_BLOCK), _TABLE: f"{STAGE_BLOCK}.attn.table.weight"}
OURS_PLAIN_CHANGES: Changes = {f"{BLOCK}.mlp.{name}": change for name, change in _FFN.items()}
OURS_STAGES_CHANGES: Changes = {**{f"{STAGE_BLOCK}.mlp.{name}": change for name, change in _FFN.items()}, _TABLE: TABLE}

# ---- microsoft/Swin-Transformer f82860b, models/swin_transformer.py; timm's own files before 0.8 ---------

MICROSOFT: Names = {
    **{timm: name for timm, name in STAGES.items() if ".downsample." not in timm},
    "layers.{i+1}.downsample.norm.{p}": "layers.{i}.downsample.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "layers.{i}.downsample.reduction.weight",
    "head.fc.{p}": "head.{p}",
}  # fmt: skip

MICROSOFT_INDEX, MICROSOFT_MASK = f"{STAGE_BLOCK}.attn.relative_position_index", f"{STAGE_BLOCK}.attn_mask"

# ---- facebookresearch/deit 7e160fe: timm's names, but LayerScale (models_v2.py) --------------------------

FACEBOOK: Names = PLAIN | {
    f"{BLOCK}.ls1.gamma": f"{BLOCK}.gamma_1", f"{BLOCK}.ls2.gamma": f"{BLOCK}.gamma_2",
}  # fmt: skip

# ---- torchvision 0.26+, torchvision/models/swin_transformer.py: stages and mergings alternate in `features`

TV_BLOCK = "features.{2i+1}.{j}"
TORCHVISION: Names = {
    "patch_embed.proj.{p}": "features.0.0.{p}",
    "patch_embed.norm.{p}": "features.0.2.{p}",
    "layers.{i+1}.downsample.norm.{p}": "features.{2i+2}.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "features.{2i+2}.reduction.weight",
    **{f"{STAGE_BLOCK}.{name}": f"{TV_BLOCK}.{name}" for name in (
        "norm1.{p}", "attn.qkv.{p}", "attn.proj.{p}", "attn.relative_position_bias_table", "norm2.{p}")},
    f"{STAGE_BLOCK}.mlp.fc1.{{p}}": f"{TV_BLOCK}.mlp.0.{{p}}",
    f"{STAGE_BLOCK}.mlp.fc2.{{p}}": f"{TV_BLOCK}.mlp.3.{{p}}",
    "norm.{p}": "norm.{p}",
    "head.fc.{p}": "head.{p}",
}  # fmt: skip

TV_INDEX = f"{TV_BLOCK}.attn.relative_position_index"

# ---- Hugging Face transformers 4.57 and 5.23, models/{vit,swin}/modeling_*.py; conversion_mapping.py ------


def _hf_block(block: str, theirs: str, qkv: tuple[str, str, str], proj: str, fc1: str, fc2: str) -> Names:
    return {
        f"{block}.norm1.{{p}}": f"{theirs}.layernorm_before.{{p}}",
        f"{block}.attn.qkv.{{p}}": tuple(f"{theirs}.attention.{name}.{{p}}" for name in qkv),
        f"{block}.attn.proj.{{p}}": f"{theirs}.attention.{proj}.{{p}}",
        f"{block}.norm2.{{p}}": f"{theirs}.layernorm_after.{{p}}",
        f"{block}.mlp.fc1.{{p}}": f"{theirs}.{fc1}.{{p}}",
        f"{block}.mlp.fc2.{{p}}": f"{theirs}.{fc2}.{{p}}",
    }


_HF_NEW = (("q_proj", "k_proj", "v_proj"), "o_proj", "mlp.fc1", "mlp.fc2")
_HF_OLD_REST = ("output.dense", "intermediate.dense", "output.dense")
_HF_OLD_PLAIN = (("attention.query", "attention.key", "attention.value"), *_HF_OLD_REST)
_HF_OLD_STAGES = (("self.query", "self.key", "self.value"), *_HF_OLD_REST)
_HF_PLAIN_TRUNK: Names = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    "norm.{p}": "layernorm.{p}",
    "head.{p}": "classifier.{p}",
}
_HF_STAGES_TRUNK: Names = {
    "patch_embed.proj.{p}": "embeddings.patch_embeddings.projection.{p}",
    "patch_embed.norm.{p}": "embeddings.norm.{p}",
    "layers.{i+1}.downsample.norm.{p}": "encoder.layers.{i}.downsample.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "encoder.layers.{i}.downsample.reduction.weight",
    "norm.{p}": "layernorm.{p}",
    "head.fc.{p}": "classifier.{p}",
}
HF_BLOCK = "encoder.layers.{i}.blocks.{j}"
HF5_PLAIN: Names = _HF_PLAIN_TRUNK | _hf_block(BLOCK, "layers.{i}", *_HF_NEW)
HF4_PLAIN: Names = _HF_PLAIN_TRUNK | _hf_block(BLOCK, "encoder.layer.{i}", *_HF_OLD_PLAIN)
HF5_STAGES: Names = _HF_STAGES_TRUNK | _hf_block(STAGE_BLOCK, HF_BLOCK, *_HF_NEW) | {
    _TABLE: f"{HF_BLOCK}.attention.relative_position_bias.relative_position_bias_table"
}  # fmt: skip
HF4_STAGES: Names = _HF_STAGES_TRUNK | _hf_block(STAGE_BLOCK, HF_BLOCK, *_HF_OLD_STAGES) | {
    _TABLE: f"{HF_BLOCK}.attention.self.relative_position_bias_table"
}  # fmt: skip
HF4_INDEX = f"{HF_BLOCK}.attention.self.relative_position_index"
HF_POOLER = {"pooler.dense.{p}": "transformers' pooler after the class token: timm's models have none"}

# ---- open-mmlab/mmpretrain ee7f2e8, models/backbones/{vision,swin}_transformer.py; mmcv 2.2 FFN ----------

_MM = "layers.{i}"
MM_PLAIN: Names = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj.{p}": "patch_embed.projection.{p}",
    "norm_pre.{p}": "pre_norm.{p}",
    f"{BLOCK}.norm1.{{p}}": f"{_MM}.ln1.{{p}}",
    f"{BLOCK}.attn.qkv.{{p}}": f"{_MM}.attn.qkv.{{p}}",
    f"{BLOCK}.attn.proj.{{p}}": f"{_MM}.attn.proj.{{p}}",
    f"{BLOCK}.ls1.gamma": f"{_MM}.attn.gamma1.weight",
    f"{BLOCK}.norm2.{{p}}": f"{_MM}.ln2.{{p}}",
    f"{BLOCK}.mlp.fc1.{{p}}": f"{_MM}.ffn.layers.0.0.{{p}}",
    f"{BLOCK}.mlp.fc2.{{p}}": f"{_MM}.ffn.layers.1.{{p}}",
    f"{BLOCK}.ls2.gamma": f"{_MM}.ffn.gamma2.weight",
    "norm.{p}": "ln1.{p}",
    "fc_norm.{p}": "ln2.{p}",
    "head.{p}": "head.layers.head.{p}",
}
MM_BLOCK = "stages.{i}.blocks.{j}"
MM_STAGES: Names = {
    "patch_embed.proj.{p}": "patch_embed.projection.{p}",
    "patch_embed.norm.{p}": "patch_embed.norm.{p}",
    "layers.{i+1}.downsample.norm.{p}": "stages.{i}.downsample.norm.{p}",
    "layers.{i+1}.downsample.reduction.weight": "stages.{i}.downsample.reduction.weight",
    f"{STAGE_BLOCK}.norm1.{{p}}": f"{MM_BLOCK}.norm1.{{p}}",
    f"{STAGE_BLOCK}.attn.qkv.{{p}}": f"{MM_BLOCK}.attn.w_msa.qkv.{{p}}",
    f"{STAGE_BLOCK}.attn.proj.{{p}}": f"{MM_BLOCK}.attn.w_msa.proj.{{p}}",
    _TABLE: f"{MM_BLOCK}.attn.w_msa.relative_position_bias_table",
    f"{STAGE_BLOCK}.norm2.{{p}}": f"{MM_BLOCK}.norm2.{{p}}",
    f"{STAGE_BLOCK}.mlp.fc1.{{p}}": f"{MM_BLOCK}.ffn.layers.0.0.{{p}}",
    f"{STAGE_BLOCK}.mlp.fc2.{{p}}": f"{MM_BLOCK}.ffn.layers.1.{{p}}",
    "norm.{p}": "norm3.{p}",
    "head.fc.{p}": "head.fc.{p}",
}
MM_INDEX = f"{MM_BLOCK}.attn.w_msa.relative_position_index"
MM_MERGING: Changes = {key: UNFOLD for key in MM_STAGES if ".downsample." in key}
