"""The dialects: who names tensors how, how a state tells, and which buffers it holds besides."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from kernelbank.errors import InputError
from kernelbank.text import suggest
from kernelbank.weights import tables
from kernelbank.weights.architecture import Architecture, Family
from kernelbank.weights.buffers import attn_masks, flat_indices, indices
from kernelbank.weights.keymap import JOIN, SAME, Dropped, KeyMap, Pattern, State, listed, rule
from kernelbank.weights.tables import Changes, Names

Derivation = Callable[[str, Architecture], State]
"""The buffers whose keys follow a pattern, made from the architecture."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one library names the tensors of one family. `marks` are keys that its states always hold, `unmarked`
    keys that they never hold; `derived` are buffers by the pattern of their keys, made anew where they are wanted.

    `pad` is what its code does at windows that the grid does not fill (see `Architecture`); None where the architecture
    says it.
    """

    name: str
    family: Family
    keys: KeyMap
    marks: tuple[str, ...]
    unmarked: tuple[str, ...] = ()
    derived: Mapping[str, Derivation] = field(default_factory=dict)
    pad: str | None = None

    @property
    def library(self) -> str:
        """Whose model it is: the name without what is said of the head."""
        return self.name.partition("-")[0]

    def buffers(self, architecture: Architecture) -> State:
        """Every derived buffer of a model of this architecture."""
        made = State()
        for pattern, derive in self.derived.items():
            made |= derive(pattern, architecture)
        return made

    def is_derived(self, key: str) -> bool:
        """Whether `key` names a derived buffer."""
        return any(Pattern(pattern).match(key) is not None for pattern in self.derived)

    def spoken(self, keys: Collection[str]) -> bool:
        """Whether `keys` are of this dialect."""
        return all(mark in keys for mark in self.marks) and not any(mark in keys for mark in self.unmarked)


def _map(names: Names, changes: Changes | None = None, dropped: Mapping[str, str] | None = None) -> KeyMap:
    """Rules from tables. Three names for one are joined, unless `changes` says otherwise."""
    changes = changes or {}
    rules = (
        rule(theirs, timm, changes.get(timm, JOIN if isinstance(theirs, tuple) else SAME))
        for timm, theirs in names.items()
    )
    return KeyMap(tuple(rules), tuple(Dropped(Pattern(key), reason) for key, reason in (dropped or {}).items()))


def _under(prefix: str, names: Names) -> Names:
    """`names` with `prefix` before each, save for the head's, which stands outside the backbone."""

    def put(name: str) -> str:
        return name if name.startswith(HEADS) else prefix + name

    return {timm: tuple(map(put, name)) if isinstance(name, tuple) else put(name) for timm, name in names.items()}


def _headless(names: Names) -> Names:
    """`names` without the head's."""
    return {timm: name for timm, name in names.items() if not timm.startswith("head.")}


# ---- the list --------------------------------------------------------------------------------------------

HEADS = ("classifier.", "head.")


def _hugging_face(name: str, plain: Names, stages: Names, queries: tuple[str, str], index: str = "") -> list[Dialect]:
    """Both families, as classifiers and bare. `queries` is the first block's query in each family, `index` the
    pattern of Swin's index where it is in the state."""
    bare = (
        Dialect(
            name=f"{name}-bare", family="plain", keys=_map(_headless(plain), dropped=tables.HF_POOLER),
            marks=(queries[0],),
        ),
        Dialect(
            name=f"{name}-bare", family="hierarchical", keys=_map(_headless(stages)), marks=(queries[1],),
            derived={index: indices} if index else {}, pad="mmpretrain",
        ),
    )  # fmt: skip
    whole = (
        replace(bare[0], name=name, keys=_map(_under("vit.", plain)), marks=(f"vit.{queries[0]}",)),
        replace(
            bare[1], name=name, keys=_map(_under("swin.", stages)), marks=(f"swin.{queries[1]}",),
            derived={f"swin.{index}": indices} if index else {},
        ),
    )  # fmt: skip
    return [*whole, *bare]


def _mmpretrain() -> list[Dialect]:
    """Both families, as classifiers and the backbones alone; ViT also with a linear head, ``head.fc``."""
    first, first_stage, index = "layers.0.ln1.weight", "stages.0.blocks.0.attn.w_msa.qkv.weight", tables.MM_INDEX
    plain, stages = _under("backbone.", tables.MM_PLAIN), _under("backbone.", tables.MM_STAGES)
    whole = Dialect(
        name="mmpretrain", family="plain", keys=_map(plain), marks=(f"backbone.{first}",),
        unmarked=("head.fc.weight",),
    )  # fmt: skip
    whole_stages = Dialect(
        name="mmpretrain", family="hierarchical", keys=_map(stages, tables.MM_MERGING),
        marks=(f"backbone.{first_stage}",), derived={f"backbone.{index}": indices}, pad="mmpretrain",
    )  # fmt: skip
    return [
        whole,
        whole_stages,
        replace(
            whole, name="mmpretrain-linear", keys=_map({**plain, "head.{p}": "head.fc.{p}"}),
            marks=(f"backbone.{first}", "head.fc.weight"), unmarked=(),
        ),
        replace(
            whole, name="mmpretrain-bare", keys=_map(_headless(tables.MM_PLAIN)), marks=(first,), unmarked=(),
        ),
        replace(
            whole_stages, name="mmpretrain-bare", keys=_map(_headless(tables.MM_STAGES), tables.MM_MERGING),
            marks=(first_stage,), derived={index: indices},
        ),
    ]  # fmt: skip


_PATCHES, _FIRST, _FIRST_STAGE = "patch_embed.proj.weight", "blocks.0.attn", "layers.0.blocks.0.attn"
_MERGED_FIRST = "layers.0.downsample.reduction.weight"

DIALECTS: tuple[Dialect, ...] = (
    Dialect(
        name="timm", family="plain", keys=_map(tables.PLAIN), marks=(f"{_FIRST}.qkv.weight", _PATCHES),
        unmarked=("blocks.0.gamma_1",),
    ),
    Dialect(
        name="timm", family="hierarchical", keys=_map(tables.STAGES), marks=(f"{_FIRST_STAGE}.qkv.weight", _PATCHES),
        unmarked=(_MERGED_FIRST,), pad="timm",
    ),
    Dialect(
        name="kernelbank", family="plain", keys=_map(tables.OURS_PLAIN, tables.OURS_PLAIN_CHANGES),
        marks=(f"{_FIRST}.q.weight", _PATCHES),
    ),
    Dialect(
        name="kernelbank", family="hierarchical", keys=_map(tables.OURS_STAGES, tables.OURS_STAGES_CHANGES),
        marks=(f"{_FIRST_STAGE}.q.weight", _PATCHES),
    ),
    Dialect(
        name="facebook", family="plain", keys=_map(tables.FACEBOOK),
        marks=(f"{_FIRST}.qkv.weight", "blocks.0.gamma_1"),
    ),
    Dialect(
        name="microsoft", family="hierarchical", keys=_map(tables.MICROSOFT),
        marks=(f"{_FIRST_STAGE}.qkv.weight", _MERGED_FIRST),
        derived={tables.MICROSOFT_INDEX: indices, tables.MICROSOFT_MASK: attn_masks},
    ),
    Dialect(
        name="torchvision", family="hierarchical", keys=_map(tables.TORCHVISION),
        marks=("features.0.0.weight", "features.1.0.attn.qkv.weight"),
        derived={tables.TV_INDEX: flat_indices}, pad="mmpretrain",
    ),
    *_hugging_face(
        "huggingface", tables.HF5_PLAIN, tables.HF5_STAGES,
        ("layers.0.attention.q_proj.weight", "encoder.layers.0.blocks.0.attention.q_proj.weight"),
    ),
    *_hugging_face(
        "huggingface4", tables.HF4_PLAIN, tables.HF4_STAGES,
        ("encoder.layer.0.attention.attention.query.weight",
         "encoder.layers.0.blocks.0.attention.self.query.weight"), tables.HF4_INDEX,
    ),
    *_mmpretrain(),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(dialect.name for dialect in DIALECTS))


def detect(keys: Collection[str]) -> Dialect:
    """The one dialect that `keys` are of. Raises InputError naming what was looked for."""
    found = [dialect for dialect in DIALECTS if dialect.spoken(keys)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"the keys are of several dialects: {', '.join(dialect.name for dialect in found)}")
    looked = ", ".join(dict.fromkeys(f"{d.marks[0]} ({d.library})" for d in DIALECTS))
    raise InputError(f"unknown dialect: the keys are {listed(keys) or 'none'}; looked for {looked}")


def known(name: str) -> str:
    """`name`, if it is a dialect's. Raises InputError."""
    if name not in NAMES:
        raise InputError(f"unknown dialect {name!r}{suggest(name, NAMES)}; legal: {', '.join(NAMES)}")
    return name


def named(name: str, family: Family) -> Dialect:
    """The dialect of this name for a family. Raises InputError for an unknown name, or one without the family."""
    for dialect in DIALECTS:
        if (dialect.name, dialect.family) == (known(name), family):
            return dialect
    legal = ", ".join(dialect.name for dialect in DIALECTS if dialect.family == family)
    raise InputError(f"{name} has no {family} models; legal: {legal}")
