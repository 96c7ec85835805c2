"""timm's names of the tensors of a ViT and a Swin, which are the pivot between all dialects."""

from __future__ import annotations

from kernelbank.weights.keymap import Names

BLOCK, STAGE_BLOCK = "blocks.{i}", "layers.{i}.blocks.{j}"

_VIT_KEYS = (
    "cls_token", "reg_token", "pos_embed", "patch_embed.proj.{p}", "norm_pre.{p}", "blocks.{i}.norm1.{p}",
    "blocks.{i}.attn.qkv.{p}", "blocks.{i}.attn.q_norm.{p}", "blocks.{i}.attn.k_norm.{p}", "blocks.{i}.attn.proj.{p}",
    "blocks.{i}.ls1.gamma", "blocks.{i}.norm2.{p}", "blocks.{i}.mlp.fc1.{p}", "blocks.{i}.mlp.fc2.{p}",
    "blocks.{i}.ls2.gamma", "norm.{p}", "fc_norm.{p}", "head.{p}",
)  # fmt: skip
_SWIN_KEYS = (
    "patch_embed.proj.{p}", "patch_embed.norm.{p}", "layers.{i}.downsample.norm.{p}",
    "layers.{i}.downsample.reduction.weight", "layers.{i}.blocks.{j}.norm1.{p}", "layers.{i}.blocks.{j}.attn.qkv.{p}",
    "layers.{i}.blocks.{j}.attn.proj.{p}", "layers.{i}.blocks.{j}.attn.relative_position_bias_table",
    "layers.{i}.blocks.{j}.norm2.{p}", "layers.{i}.blocks.{j}.mlp.fc1.{p}", "layers.{i}.blocks.{j}.mlp.fc2.{p}",
    "norm.{p}", "head.fc.{p}",
)  # fmt: skip
VIT: Names = {key: key for key in _VIT_KEYS}
SWIN: Names = {key: key for key in _SWIN_KEYS}


def under(prefix: str, names: Names, heads: tuple[str, ...] = ("classifier.", "head.")) -> Names:
    """Return `names` with `prefix` before each, except for the head, which is outside the backbone."""

    def put(name: str) -> str:
        return name if name.startswith(heads) else prefix + name

    return {timm: tuple(map(put, name)) if isinstance(name, tuple) else put(name) for timm, name in names.items()}


def headless(names: Names) -> Names:
    """Return `names` without those of the head."""
    return {timm: name for timm, name in names.items() if not timm.startswith("head.")}
