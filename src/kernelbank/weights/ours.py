"""The names of the tensors in a backbone of this library: those of timm for the trunk, and those of `spec.inventory`
for the mixers and MLPs."""

from __future__ import annotations

from kernelbank.nn.timm_names import FFN, FUSED
from kernelbank.weights.changes import FFN_BIAS, FFN_WEIGHT, TABLE
from kernelbank.weights.keymap import SAME, Changes, KeyMap, Names, key_map
from kernelbank.weights.pivot import BLOCK, STAGE_BLOCK, SWIN, VIT

_FFN = {"fc1.weight": FFN_WEIGHT, "fc1.bias": FFN_BIAS, "fc2.weight": FFN_WEIGHT, "fc2.bias": SAME}
_TABLE = f"{STAGE_BLOCK}.attn.relative_position_bias_table"


def _names(timm: Names, block: str) -> Names:
    """timm's names with mixers in `block`. The weights and biases of the FFN have separate rules, since their
    conversions differ."""
    renamed = {key: name for key, name in timm.items() if not key.startswith(f"{block}.mlp.")}
    renamed[f"{block}.attn.qkv.{{p}}"] = tuple(f"{block}.attn.{name}.{{p}}" for name in FUSED["qkv"])
    renamed[f"{block}.attn.proj.{{p}}"] = f"{block}.attn.out.{{p}}"
    ffn = {f"{fc}.{kind}": f"{name}.{kind}" for fc, name in FFN.items() for kind in ("weight", "bias")}
    return renamed | {f"{block}.mlp.{theirs}": f"{block}.mlp.{ours}" for theirs, ours in ffn.items()}


def _changes(block: str) -> Changes:
    return {f"{block}.mlp.{name}": change for name, change in _FFN.items()}


KEYS: dict[str, KeyMap] = {
    "vit": key_map(_names(VIT, BLOCK), _changes(BLOCK)),
    "swin": key_map(
        {**_names(SWIN, STAGE_BLOCK), _TABLE: f"{STAGE_BLOCK}.attn.table.weight"},
        {**_changes(STAGE_BLOCK), _TABLE: TABLE},
    ),
}
"""The key maps between this library and timm, by the family of the trunk."""
