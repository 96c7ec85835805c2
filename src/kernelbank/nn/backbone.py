"""One backbone: a list of stages. One stage is plain (ViT), several are hierarchical (Swin); every block takes a
record for its mixer and one for its MLP.

Trunk parts are timm's (patch embedding, patch merging, drop path), with timm's names and order.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from timm.layers import DropPath, PatchEmbed
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from kernelbank.atlas import Skeleton
from kernelbank.inventory import Grid
from kernelbank.nn.layers import TokenBatchNorm
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec, SpecError, read_mlps, read_stages

NORM_EPS = 1e-6  # LayerNorm in timm's ViT


class Block(nn.Module):
    """x + DropPath(mixer(norm(x))), then x + DropPath(mlp(norm(x))) unless there is no MLP.

    Around a bn_relu mixer there is no norm before the mixer and BatchNorm before the MLP (DWNet).
    """

    def __init__(
        self,
        mixer: MixerSpec,
        mlp: MixerSpec | None,
        dim: int,
        num_heads: int,
        grid: Grid,
        prefix: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        normed_inside = mixer.frame == "bn_relu"
        self.norm1 = nn.Identity() if normed_inside else nn.LayerNorm(dim, eps=NORM_EPS)
        self.mixer = Mixer(mixer, dim, num_heads, grid, prefix=prefix)
        self.norm2: nn.Module | None = None
        self.mlp: Mixer | None = None
        if mlp is not None:
            self.norm2 = TokenBatchNorm(dim) if normed_inside else nn.LayerNorm(dim, eps=NORM_EPS)
            self.mlp = Mixer(mlp, dim, num_heads, grid, prefix=prefix)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """An optional patch merging, then blocks at one resolution."""

    def __init__(self, merge_from: int | None, dim: int, grid: Grid, blocks: list[Block]) -> None:
        super().__init__()
        self.grid = grid
        self.downsample = None if merge_from is None else PatchMerging(merge_from, dim)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens on the grid of the stage before -> tokens on this stage's grid, and that grid."""
        if self.downsample is not None:
            x = self.downsample(x.unflatten(1, grid)).flatten(1, 2)
        return self.blocks(x), self.grid


class Backbone(nn.Module):
    """Images (B, in_chans, H, W) -> logits (B, num_classes).

    `mixer` and `mlp` are records as text, one for all stages or one each separated by ``|``; ``none`` as `mlp`
    removes the MLP. Alternating shifts are resolved by the block's index inside its stage.

    Raises SpecError for an image that the patches do not fill, prefix tokens in a hierarchical skeleton, and what
    the records themselves refuse.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        mixer: str = "vit",
        mlp: str = "ffn",
        *,
        img_size: Grid,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        _check(skeleton, img_size)
        self.skeleton, self.num_classes = skeleton, num_classes
        p, width, hierarchical = skeleton.patch_size, skeleton.dims[0], len(skeleton.dims) > 1
        self.patch_embed = PatchEmbed(img_size, p, in_chans, width, norm_layer=nn.LayerNorm if hierarchical else None)
        grid = (img_size[0] // p, img_size[1] // p)
        self.cls_token = _embedding(1, width) if skeleton.global_pool == "token" else None
        self.reg_token = _embedding(skeleton.reg_tokens, width) if skeleton.reg_tokens else None
        tokens = skeleton.prefix + grid[0] * grid[1]
        self.pos_embed = _embedding(tokens, width) if skeleton.position == "absolute" else None
        self.grid = grid
        self.stages = nn.ModuleList(_stages(skeleton, mixer, mlp, grid, drop_path_rate))
        self.norm = nn.LayerNorm(skeleton.dims[-1], eps=NORM_EPS)
        self.head = nn.Linear(skeleton.dims[-1], num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> normed tokens (B, T, C) of the last stage, prefix first."""
        x = self.patch_embed(x)
        prefix = [token.expand(x.shape[0], -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = torch.cat([*prefix, x], 1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        grid = self.grid
        for stage in self.stages:
            x, grid = stage(x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> the class token or the mean over the grid, then the classifier unless `pre_logits`."""
        x = x[:, 0] if self.skeleton.global_pool == "token" else x[:, self.skeleton.prefix :].mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay besides vectors: embeddings and relative tables (Swin, ViT)."""
        embeddings = {"cls_token", "reg_token", "pos_embed"}
        return {name for name, _ in self.named_parameters() if name in embeddings or ".table." in name}


def _check(skeleton: Skeleton, img_size: Grid) -> None:
    if img_size[0] % skeleton.patch_size or img_size[1] % skeleton.patch_size:
        raise SpecError(
            f"img_size={img_size} is not legal; legal: sides divisible by the patch of {skeleton.patch_size}"
        )
    if len(skeleton.dims) > 1 and skeleton.prefix:
        raise SpecError(f"{skeleton.prefix} prefix tokens are not legal in {len(skeleton.dims)} stages: patch merging "
                        "joins grid positions; legal: global_pool='avg', reg_tokens=0")  # fmt: skip


def _embedding(tokens: int, dim: int) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(1, tokens, dim))
    nn.init.trunc_normal_(parameter, std=0.02)
    return parameter


def _stages(skeleton: Skeleton, mixer: str, mlp: str, grid: Grid, drop_path_rate: float) -> list[Stage]:
    """The stages with their records resolved: merging halves the grid, odd sides are padded up."""
    count, starts = len(skeleton.dims), [0, *accumulate(skeleton.depths)]
    mixers = read_stages(mixer, count)
    mlps = read_mlps(mlp, count)
    rates = [drop_path_rate * block / max(starts[-1] - 1, 1) for block in range(starts[-1])]
    stages = []
    for i, (dim, heads) in enumerate(zip(skeleton.dims, skeleton.num_heads, strict=True)):
        grid = (-(-grid[0] // 2), -(-grid[1] // 2)) if i else grid
        blocks = []
        for j in range(skeleton.depths[i]):
            mlp_spec, rate = mlps[i], rates[starts[i] + j]
            mlp_spec = None if mlp_spec is None else mlp_spec.at_block(j)
            blocks.append(Block(mixers[i].at_block(j), mlp_spec, dim, heads, grid, skeleton.prefix, rate))
        stages.append(Stage(skeleton.dims[i - 1] if i else None, dim, grid, blocks))
    return stages
