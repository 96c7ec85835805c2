"""The description of a model: everything that a file must state to rebuild it. Imports no torch.

A `ModelSpec` is a trunk, the specs of its mixers and MLPs, and the sizes of its input and output. Registered models,
converted checkpoints, saved files, training runs, benchmarks and studies all hold one; `nn.build` builds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from kernelbank.errors import SpecError
from kernelbank.schema import decode
from kernelbank.spec import MixerSpec, TwoStep, Window, read_mlps, read_stages
from kernelbank.spec.arguments import COUNT
from kernelbank.spec.text import finite

Grid = tuple[int, int]
MODEL_VERSION = 3
READABLE_VERSIONS = (2, 3)
RESERVED_ARGUMENTS = frozenset({
    "cache_dir", "checkpoint_path", "img_size", "in_chans", "num_classes", "pretrained", "pretrained_cfg",
    "pretrained_cfg_overlay",
})  # fmt: skip
"""Arguments of ``timm.create_model`` that a `TimmTrunk` cannot hold: a description loads no weights."""


@dataclass(frozen=True)
class Stage:
    """Blocks at one resolution: `depth` blocks of `dim` channels and `num_heads` heads on a `grid` of (H, W) positions
    after `prefix` tokens. `mixer` keeps an alternating shift (see `MixerSpec.at_block`); `mlp` is None without MLPs."""

    dim: int
    depth: int
    num_heads: int
    grid: Grid
    prefix: int
    mixer: MixerSpec
    mlp: MixerSpec | None


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """The dropout rates of a model under timm's names; `drop_path_rate` is that of the last block, rising linearly from
    zero in the first.

    Raises:
        SpecError: If a rate is not a number with 0 <= rate < 1.
    """

    drop_rate: float = 0.0
    pos_drop_rate: float = 0.0
    proj_drop_rate: float = 0.0
    attn_drop_rate: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for rate in fields(self):
            value = getattr(self, rate.name)
            if not finite(value) or not 0 <= value < 1:
                raise SpecError(f"invalid {rate.name}={value!r}; expected 0 <= {rate.name} < 1")


@dataclass(frozen=True, kw_only=True)
class ViTTrunk:
    """timm's VisionTransformer without the mixers and MLPs of its blocks: one stage, prefix tokens first.

    The arguments are timm's. `init_values` is the initial LayerScale (None: no LayerScale), `fc_norm` a norm after
    pooling (None: where the pooling averages, as in timm), `norm_eps` the epsilon of every LayerNorm but those of the
    mixers.

    Raises:
        SpecError: If a size is not a whole number >= 1, or an option is unknown.
    """

    family: ClassVar[str] = "vit"
    patch_size: Grid = (16, 16)
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    class_token: bool = True
    reg_tokens: int = 0
    pos_embed: Literal["learn", "none"] = "learn"
    no_embed_class: bool = False
    global_pool: Literal["token", "avg", "avgmax", "max", ""] = "token"
    pool_include_prefix: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    fc_norm: bool | None = None
    init_values: float | None = None
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self.patch_size, embed_dim=self.embed_dim, depth=self.depth, num_heads=self.num_heads)
        _check_option("pos_embed", self.pos_embed, ("learn", "none"))
        _check_option("global_pool", self.global_pool, ("token", "avg", "avgmax", "max", ""))
        _check_eps(self.norm_eps)
        if self.global_pool == "token" and not self.class_token:
            raise SpecError("invalid global_pool='token' with class_token=False; expected another pooling")
        if self.reg_tokens != 0 and not COUNT.accepts(self.reg_tokens):
            raise SpecError(f"invalid reg_tokens={self.reg_tokens!r}; expected a whole number >= 0")

    @property
    def dims(self) -> tuple[int, ...]:
        """The channels of each stage."""
        return (self.embed_dim,)

    @property
    def depths(self) -> tuple[int, ...]:
        """The blocks of each stage."""
        return (self.depth,)

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads of each stage."""
        return (self.num_heads,)

    @property
    def prefix(self) -> int:
        """The tokens before the grid: class token and registers (timm's num_prefix_tokens)."""
        return self.class_token + self.reg_tokens


@dataclass(frozen=True, kw_only=True)
class SwinTrunk:
    """timm's SwinTransformer without the mixers and MLPs of its blocks: stages joined by patch merging, which halves
    the grid (odd sides padded up) and doubles the channels. `embed_dim` is the width of the first stage.

    Raises:
        SpecError: If a size is not a whole number >= 1, or `num_heads` does not have one entry per stage.
    """

    family: ClassVar[str] = "swin"
    patch_size: Grid = (4, 4)
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    global_pool: Literal["avg", "avgmax", "max", ""] = "avg"
    dynamic_img_size: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.num_heads) or not self.depths:
            raise SpecError(f"invalid num_heads={self.num_heads}; expected one entry per stage of depths={self.depths}")
        stages = {f"depths[{i}]": depth for i, depth in enumerate(self.depths)}
        stages |= {f"num_heads[{i}]": heads for i, heads in enumerate(self.num_heads)}
        _check_sizes(self.patch_size, embed_dim=self.embed_dim, **stages)
        _check_option("global_pool", self.global_pool, ("avg", "avgmax", "max", ""))
        _check_eps(self.norm_eps)

    prefix: ClassVar[int] = 0

    @property
    def dims(self) -> tuple[int, ...]:
        """The channels of each stage."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))

    @property
    def heads(self) -> tuple[int, ...]:
        """The heads of each stage."""
        return self.num_heads


@dataclass(frozen=True, kw_only=True)
class TimmTrunk:
    """A stock model of timm by its name, with arguments of its constructor. It has mixers of its own.

    Raises:
        SpecError: If an argument is not one of the constructor: weights to load, or a size that `ModelSpec` states.
    """

    family: ClassVar[str] = "timm"
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if reserved := sorted(RESERVED_ARGUMENTS & self.arguments.keys()):
            raise SpecError(f"invalid arguments of {self.name}: {reserved[0]!r}; expected arguments of its constructor "
                            f"without {', '.join(sorted(RESERVED_ARGUMENTS))}")  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.name, repr(sorted(self.arguments.items()))))


Trunk = ViTTrunk | SwinTrunk | TimmTrunk
TRUNKS: Mapping[str, type[Trunk]] = MappingProxyType({t.family: t for t in (ViTTrunk, SwinTrunk, TimmTrunk)})


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model: its trunk, its mixers and MLPs as the text of their specs (one for all stages, or one per stage
    separated by ``|``; an MLP may be ``none``), and the sizes of its input and output.

    A `TimmTrunk` has None where it keeps its own mixers, MLPs and image size. `name` is what people call the model: a
    registered name, or where its weights came from.

    Raises:
        SpecError: If a mixer or MLP is not a spec, or if the patches do not fill the image.
    """

    trunk: Trunk
    mixer: str | None = None
    mlp: str | None = None
    img_size: Grid | None = None
    in_chans: int = 3
    num_classes: int = 1000
    dropout: Dropout = Dropout()
    name: str = ""

    def __post_init__(self) -> None:
        if not COUNT.accepts(self.in_chans):
            raise SpecError(f"invalid in_chans={self.in_chans!r}; expected {COUNT.expected}")
        if self.num_classes != 0 and not COUNT.accepts(self.num_classes):
            raise SpecError(f"invalid num_classes={self.num_classes!r}; expected a whole number >= 0")
        if isinstance(self.trunk, TimmTrunk):
            if self.mlp is not None:
                raise SpecError(f"invalid mlp={self.mlp!r}; expected None, as {self.trunk.name} of timm has its own")
            return
        for option in ("mixer", "mlp", "img_size"):
            if getattr(self, option) is None:
                raise SpecError(f"invalid {option}=None; only a stock model of timm has one of its own")
        check_image(self.image, self.trunk.patch_size, getattr(self.trunk, "dynamic_img_pad", False))
        _ = self.stages

    @property
    def image(self) -> Grid:
        """(H, W) of the images in pixels. Raises SpecError for a stock model that keeps its own."""
        if self.img_size is None:
            raise SpecError(f"invalid img_size=None; expected the height and width of the images of {self.name}")
        return self.img_size

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages with their specs and grids. Raises SpecError for a stock model of timm, and as `read_stages`."""
        trunk = self.trunk
        if isinstance(trunk, TimmTrunk):
            raise SpecError(f"invalid trunk={trunk.name}: the blocks of a stock model are timm's own; expected a "
                            f"{ViTTrunk.family} or {SwinTrunk.family} trunk")  # fmt: skip
        count = len(trunk.depths)
        mixers, mlps = read_stages(self.mixer or "", count), read_mlps(self.mlp or "", count)
        height, width = (side // step for side, step in zip(self.image, trunk.patch_size, strict=True))
        return tuple(
            Stage(dim, depth, heads, (-(-height // 2**i), -(-width // 2**i)), trunk.prefix, mixer, mlp)
            for i, (dim, depth, heads, mixer, mlp) in enumerate(
                zip(trunk.dims, trunk.depths, trunk.heads, mixers, mlps, strict=True)
            )
        )

    def canonical(self) -> ModelSpec:
        """The same model with its specs as they print themselves: equal models have equal texts."""
        if isinstance(self.trunk, TimmTrunk):
            return self
        return replace(
            self,
            mixer=by_stage([str(stage.mixer) for stage in self.stages]),
            mlp=by_stage(["none" if stage.mlp is None else str(stage.mlp) for stage in self.stages]),
        )

    def at_size(self, img_size: Grid) -> ModelSpec:
        """The same model for images of another size."""
        return replace(self, img_size=img_size)

    def to_document(self) -> dict[str, Any]:
        """The description as plain JSON values, with a ``model_version`` and the ``family`` of the trunk."""
        document = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("trunk", "dropout")}
        document["dropout"] = asdict(self.dropout)
        trunk = {f.name: getattr(self.trunk, f.name) for f in fields(self.trunk)}
        return {"model_version": MODEL_VERSION, "family": self.trunk.family, "trunk": _plain(trunk), **_plain(document)}

    @classmethod
    def from_document(cls, document: object) -> ModelSpec:
        """The model of `to_document`.

        Raises:
            ValueError: If a field is missing, unknown or of another type, or the version is another one; the message
                names the field. SpecError (a ValueError) if the values do not describe a model.
        """
        if not isinstance(document, Mapping):
            raise ValueError(f"expected a JSON object, got {type(document).__name__}")
        rest = dict(document)
        version, family = rest.pop("model_version", None), rest.pop("family", None)
        if version not in READABLE_VERSIONS:
            raise ValueError(f"invalid model_version={version!r}; expected {MODEL_VERSION}")
        if not isinstance(family, str) or family not in TRUNKS:
            raise ValueError(f"invalid family={family!r}; expected one of {', '.join(TRUNKS)}")
        if "trunk" not in rest:
            raise ValueError("model lacks the field 'trunk'")
        if version == 2:
            rest = _with_norm_in_spec(rest)
        trunk = decode(TRUNKS[family], rest.pop("trunk"), "trunk")
        return decode(cls, rest, "model", trunk=trunk)


def _with_norm_in_spec(document: dict[str, Any]) -> dict[str, Any]:
    """A document of version 2, whose ViT trunks say whether the mixers normalise queries and keys, as one of version 3,
    whose specs do."""
    trunk, mixer = document["trunk"], document.get("mixer")
    if not isinstance(trunk, Mapping):
        return document
    rest = {name: value for name, value in trunk.items() if name != "qk_norm"}
    if trunk.get("qk_norm") is True and isinstance(mixer, str):
        mixer = str(with_qk_norm(MixerSpec.parse(mixer)))
    return document | {"trunk": rest, "mixer": mixer}


def with_qk_norm(spec: MixerSpec) -> MixerSpec:
    """`spec` with a LayerNorm of queries and keys per head, as timm's argument `qk_norm` adds it. Raises SpecError for
    a spec that is not attention."""
    if not isinstance(spec.kernel, TwoStep):
        raise SpecError(f"invalid qk_norm=True for {spec}; expected a dynamic two_step in frame linear")
    return replace(spec, kernel=replace(spec.kernel, norm="layernorm"))


def by_stage(texts: list[str]) -> str:
    """Texts of the stages as one: once if they are all the same, else separated by ``|``."""
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)


def with_window(text: str, side: int) -> str:
    """The specs of `text` with windows of another side; those without windows stay as they are."""
    texts = []
    for part in text.split("|"):
        spec = MixerSpec.parse(part)
        if isinstance(spec.support, Window):
            spec = replace(spec, support=replace(spec.support, M=side))
        texts.append(str(spec))
    return by_stage(texts)


def check_image(img_size: Grid, patch_size: Grid, padded: bool = False) -> None:
    """Raise SpecError unless both are (height, width) in pixels and the patches fill the image, or it is `padded`."""
    for option, pair in (("patch_size", patch_size), ("img_size", img_size)):
        if len(pair) != 2 or not all(COUNT.accepts(side) for side in pair):
            raise SpecError(f"invalid {option}={pair}; expected (height, width), each {COUNT.expected}")
    if not padded and any(side % step for side, step in zip(img_size, patch_size, strict=True)):
        raise SpecError(f"invalid img_size={img_size}; expected sides divisible by the patch size {patch_size}")


def _check_sizes(patch_size: Grid, **sizes: object) -> None:
    check_image(patch_size, patch_size)
    for option, value in sizes.items():
        if not COUNT.accepts(value):
            raise SpecError(f"invalid {option}={value!r}; expected {COUNT.expected}")


def _check_option(option: str, value: object, expected: tuple[str, ...]) -> None:
    if value not in expected:
        raise SpecError(f"invalid {option}={value!r}; expected one of {', '.join(map(repr, expected))}")


def _check_eps(value: object) -> None:
    if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise SpecError(f"invalid norm_eps={value!r}; expected a finite number > 0")


def _plain(value: Any) -> Any:
    """Tuples as lists and mappings as dictionaries, so that a document equals what JSON gives back."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
