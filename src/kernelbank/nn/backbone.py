"""Backbones: trunks of timm with blocks whose mixer and MLP are given by specs. `PlainBackbone` has one stage (timm's
VisionTransformer), `HierarchicalBackbone` several (timm's SwinTransformer).

Everything but the blocks is timm's, including names and behaviour. The docstrings state what the blocks add.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from timm.layers import LayerNorm as ViTLayerNorm
from timm.layers import PatchEmbed, calculate_drop_path_rates, get_norm_layer, to_2tuple
from timm.models.swin_transformer import SwinTransformer, resolve_stage_window_sizes, window_sizes_from_ratio
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kernelbank.model import check_image, with_qk_norm
from kernelbank.nn.block import BlockOptions, Norm, PlainBlock, StageBlock, StageSpecs, TokenGrid
from kernelbank.nn.edit.stock import head_norm_kind
from kernelbank.nn.mixer import Mixer
from kernelbank.spec import MixerSpec, SpecError, Window, read_mlps, read_stages
from kernelbank.spec.arguments import COUNT
from kernelbank.spec.inventory import Grid

# Arguments of timm's trunks that a spec states instead, and the argument that states them.
STATED_BY_SPECS = {
    "attn_layer": "mixer='vit'", "block_fn": "mixer='vit'", "mlp_layer": "mlp='ffn'",
    "mlp_ratio": "mlp='ffn bank=static(4C)'", "qkv_bias": "mixer='vit bias=False'",
    "act_layer": "mlp='ffn activation=gelu'", "scale_attn_norm": "mixer='vit'", "scale_mlp_norm": "mlp='ffn'",
    "proj_bias": "mixer='vit'", "head_dim": "num_heads", "always_partition": "mixer='swin support=window(7)'",
}  # fmt: skip
INITS = ("", "skip", "reset")
DEFAULT_WINDOW = 7  # of a stage without windows, since timm stores a window size for every stage


class PlainBackbone(VisionTransformer):
    """A plain backbone: timm's VisionTransformer, with `mixer` and `mlp` in every block (``none`` removes the MLP).

    `mixer` and `mlp` are specs as text. The other arguments are timm's: class_token, reg_tokens, global_pool,
    pos_embed, no_embed_class, init_values (LayerScale), dynamic_img_size, drop rates and so on; `qk_norm` adds a
    LayerNorm per head to the kernel of `mixer`. With
    `dynamic_img_size`, and in `set_input_size`, relative tables and the matrices of `project` are resampled as the
    position embedding is.

    Raises:
        SpecError: For specs that do not exist or do not fit, images that the patches do not fill, and arguments that a
            spec states instead.
    """

    def __init__(
        self,
        mixer: str = "vit",
        mlp: str = "ffn",
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        qk_norm: bool = False,
        init_values: float | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Norm | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **trunk: Any,
    ) -> None:
        specs = StageSpecs(read_stages(mixer, 1)[0], read_mlps(mlp, 1)[0])
        _check(trunk, img_size, patch_size, padded=dynamic_img_pad)
        _check_counts(depth=depth, num_heads=num_heads, embed_dim=embed_dim)
        norm = cast(Norm, get_norm_layer(norm_layer) or ViTLayerNorm)
        if qk_norm:
            if head_norm_kind(norm(1), "qk_norm") != "layernorm":
                raise SpecError("invalid qk_norm=True with another norm_layer; expected mixer="
                                "'vit kernel=two_step(norm=rmsnorm)'")  # fmt: skip
            specs = replace(specs, mixer=with_qk_norm(specs.mixer))
        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depth=0, num_heads=num_heads,
            dynamic_img_size=dynamic_img_size, dynamic_img_pad=dynamic_img_pad, norm_layer=norm_layer, device=device,
            dtype=dtype, **trunk,
        )  # fmt: skip
        token_grid = TokenGrid(cast(PatchEmbed, self.patch_embed), dynamic_img_size)
        options = BlockOptions(
            dim=embed_dim, num_heads=num_heads, grid=self.patch_embed.grid_size, prefix=self.num_prefix_tokens,
            init_values=init_values, proj_drop=proj_drop_rate, attn_drop=attn_drop_rate,
            dynamic=dynamic_img_size, norm_layer=norm, device=device, dtype=dtype,
        )  # fmt: skip
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.Sequential(
            *(PlainBlock(specs, i, replace(options, drop_path=rate), token_grid) for i, rate in enumerate(rates))
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters that timm excludes from weight decay, and the relative tables, as in Swin."""
        return {*super().no_weight_decay(), *table_names(self)}

    def set_input_size(self, img_size: Sequence[int] | None = None, patch_size: Sequence[int] | None = None) -> None:
        """Change the image or patch size. The position embedding is resampled as in timm; relative tables and the
        matrices of `project` are resampled and rescaled (see `nn.edit.carry`). Raises SpecError for images that the
        patches do not fill."""
        embed = self.patch_embed
        _check_image(img_size or embed.img_size, patch_size or embed.patch_size, padded=embed.dynamic_img_pad)
        super().set_input_size(img_size=img_size, patch_size=patch_size)
        for block in cast(Iterable[PlainBlock], self.blocks):
            block.set_grid(tuple(embed.grid_size))

    def mixers_on(self, grid: Grid) -> Iterator[tuple[str, Mixer, Grid]]:
        """Yield every mixer with its path and its grid, for patches on `grid`."""
        yield from ((path, module, grid) for path, module in self.named_modules() if isinstance(module, Mixer))


class HierarchicalBackbone(SwinTransformer):
    """A hierarchical backbone: timm's SwinTransformer, with the `mixer` and `mlp` of its stage in every block.

    `mixer` and `mlp` are specs as text, one for all stages or one per stage separated by ``|``; ``mlp="none"`` removes
    the MLP. `window_size`, one for all stages or one per stage as in timm, changes the side of windows in the specs
    that have windows. The other arguments are timm's.

    Raises:
        SpecError: As `PlainBackbone`.
    """

    def __init__(
        self,
        mixer: str = "swin",
        mlp: str = "ffn",
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[Any] | None = None,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Norm = nn.LayerNorm,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **trunk: Any,
    ) -> None:
        stages = len(depths)
        _check_counts(embed_dim=embed_dim, **{f"depths[{i}]": depth for i, depth in enumerate(depths)})
        if not isinstance(num_heads, Sequence) or len(num_heads) != stages:
            raise SpecError(f"invalid num_heads={num_heads}; expected one for each stage of depths={depths}")
        _check(trunk, img_size, patch_size)
        pairs = zip(read_stages(mixer, stages), read_mlps(mlp, stages), strict=True)
        specs = _with_windows([StageSpecs(*pair) for pair in pairs], window_size)
        norm = cast(Norm, get_norm_layer(norm_layer))
        super().__init__(
            img_size=img_size, patch_size=patch_size, embed_dim=embed_dim, depths=(0,) * stages, num_heads=num_heads,
            window_size=window_sides([stage.mixer for stage in specs]), norm_layer=norm, device=device, dtype=dtype,
            **trunk,
        )  # fmt: skip
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, stage in enumerate(self.layers):
            options = BlockOptions(
                dim=embed_dim * 2**i, num_heads=num_heads[i], grid=tuple(stage.output_resolution),
                proj_drop=proj_drop_rate, attn_drop=attn_drop_rate, dynamic=self.dynamic_img_size,
                norm_layer=norm, device=device, dtype=dtype,
            )  # fmt: skip
            stage.depth = depths[i]
            stage.blocks = nn.Sequential(
                *(StageBlock(specs[i], j, replace(options, drop_path=rate)) for j, rate in enumerate(rates[i]))
            )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The relative tables, as in Swin."""
        return table_names(self)

    def set_input_size(
        self,
        img_size: Sequence[int] | None = None,
        patch_size: Sequence[int] | None = None,
        window_size: int | Sequence[Any] | None = None,
        window_ratio: int | Sequence[int] | None = None,
        always_partition: bool | None = None,
    ) -> None:
        """Change the image, patch or window size. Tables are resampled and rescaled (see `nn.edit.carry`).

        Windows keep the side that the spec states unless `window_size` or `window_ratio` is given; timm scales them
        with the grid.

        Raises:
            SpecError: For images that the patches do not fill, windows that are not square, and `always_partition`. The
                model is then unchanged.
        """
        if always_partition:
            raise SpecError("invalid always_partition=True: no window is larger than the grid; expected False")
        embed = self.patch_embed
        image, patch = to_2tuple(img_size or embed.img_size), to_2tuple(patch_size or embed.patch_size)
        check_image(image, patch)
        if window_size is None and window_ratio is not None:
            grid = (image[0] // patch[0], image[1] // patch[1])
            window_size = window_sizes_from_ratio(grid, window_ratio, len(self.layers))
        specs = _with_windows([stage.blocks[0].specs for stage in self.layers], window_size)
        for stage, stage_spec in zip(self.layers, specs, strict=True):
            for block in stage.blocks:
                block.specs = stage_spec
        mixers = [stage.mixer for stage in specs]
        super().set_input_size(img_size, patch_size, window_sides(mixers))
        remember(self, mixer=" | ".join(map(str, mixers)), window_size=None)

    def mixers_on(self, grid: Grid) -> Iterator[tuple[str, Mixer, Grid]]:
        """Yield every mixer with its path and its grid, for patches on `grid`. Patch merging halves the grid and pads
        odd sides."""
        for i, stage in enumerate(self.layers):
            stage_grid = (-(-grid[0] // 2**i), -(-grid[1] // 2**i))
            for path, module in stage.named_modules(prefix=f"layers.{i}"):
                if isinstance(module, Mixer):
                    yield path, module, stage_grid


Backbone = PlainBackbone | HierarchicalBackbone


def _with_windows(specs: Sequence[StageSpecs], window_size: int | Sequence[Any] | None) -> list[StageSpecs]:
    """Return `specs` with the windows of timm's `window_size`, or unchanged for None. Raises SpecError if the number of
    windows is not that of the stages, and for windows that are not square."""
    if window_size is None:
        return list(specs)
    try:
        windows = resolve_stage_window_sizes(window_size, len(specs))
    except (AssertionError, TypeError):
        raise SpecError(f"invalid window_size={window_size}; expected a side >= 2, one for all of {len(specs)} "
                        "stages or one each") from None  # fmt: skip
    return [stage.with_window(window) for stage, window in zip(specs, windows, strict=True)]


def window_sides(specs: Sequence[MixerSpec], without: Sequence[tuple[int, int]] = ()) -> tuple[tuple[int, int], ...]:
    """The window sizes of the stages as timm stores them, with those of `without` for stages without windows."""
    kept = without or ((DEFAULT_WINDOW, DEFAULT_WINDOW),) * len(specs)
    return tuple(
        (spec.support.M, spec.support.M) if isinstance(spec.support, Window) else side
        for spec, side in zip(specs, kept, strict=True)
    )


def remember(model: nn.Module, **arguments: Any) -> None:
    """Change the arguments that a saved configuration rebuilds `model` from; None removes one. timm stores them in
    ``_model_args`` and has no public function to change them (`timm.models._input`, 1.0.31)."""
    changed = getattr(model, "_model_args", {}) | arguments
    setattr(model, "_model_args", {k: v for k, v in changed.items() if v is not None})  # noqa: B010 - untyped in timm


def table_names(model: nn.Module) -> set[str]:
    """The parameters that are relative tables."""
    return {name for name, _ in model.named_parameters() if ".table." in name}


def _check(trunk: Mapping[str, Any], img_size: Any, patch_size: Any, padded: bool = False) -> None:
    for name, value in trunk.items():
        if name in STATED_BY_SPECS:
            raise SpecError(f"invalid {name}={value!r}: a spec states it; expected {STATED_BY_SPECS[name]}")
    if trunk.get("fix_init"):
        raise SpecError("invalid fix_init=True: mixers are initialised as `inventory` states; expected False")
    if (mode := trunk.get("weight_init", "")) not in INITS:
        raise SpecError(f"invalid weight_init={mode!r}: mixers are initialised as `inventory` states; expected {INITS}")
    if rate := trunk.get("patch_drop_rate"):
        raise SpecError(f"invalid patch_drop_rate={rate}: dropped patches have no place on the grid; expected 0")
    _check_image(img_size, patch_size, padded)


def _check_counts(**counts: Any) -> None:
    """Raise SpecError unless each is a whole number >= 1."""
    for name, value in counts.items():
        if not COUNT.accepts(value):
            raise SpecError(f"invalid {name}={value!r}; expected {COUNT.expected}")


def _check_image(img_size: Any, patch_size: Any, padded: bool) -> None:
    """`check_image` for sides or (height, width) in pixels, as timm takes them."""
    check_image(tuple(to_2tuple(img_size)), tuple(to_2tuple(patch_size)), padded)
