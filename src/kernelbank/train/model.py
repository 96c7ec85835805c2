"""The model of a run: its description from the words of a command, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

import kernelbank.models  # noqa: F401  (registers ours with timm)
from kernelbank.analysis.cost import model_cost
from kernelbank.errors import InputError, SpecError
from kernelbank.memory import check_memory
from kernelbank.model import Dropout, ModelSpec, TimmTrunk, by_stage, with_qk_norm, with_window
from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone
from kernelbank.nn.build import build
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.schema import decode
from kernelbank.spec import read_stages
from kernelbank.text import one_line, suggest
from kernelbank.weights.file import open_model_file
from kernelbank.zoo import NAMED, SMALL, find

NEW = ": new"
"""The end of a note on weights that are not loaded."""
DROPOUT = tuple(f.name for f in fields(Dropout))


@dataclass(frozen=True)
class InitialWeights:
    """Where the weights come from before training: a file, timm's published weights, or a random draw. `mixer` is the
    text of specs, or of cells of specs, that replace the mixers of a model with weights."""

    checkpoint: str | None = None
    pretrained: bool = False
    mixer: str | None = None

    @property
    def given(self) -> bool:
        """Whether there are weights from elsewhere."""
        return self.pretrained or self.checkpoint is not None


# ---- the description -------------------------------------------------------------------------------------


def check_model(name: str) -> None:
    """Raise InputError unless `name` is a model of the zoo or of timm; after a dot, it may have a tag of weights that
    timm lists."""
    if name in NAMED:
        return
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        known = [*NAMED, *timm.list_models()]
        raise InputError(f"unknown model {name!r}{suggest(name, known)}; expected one of {', '.join(NAMED)}, or a "
                         "model of timm (timm.list_models)")  # fmt: skip
    if tag and name not in timm.list_pretrained(base):
        raise InputError(f"unknown weights {tag!r} of model {base}; expected a tag of timm.list_pretrained({base!r})")


def expected_input(name: str) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]:
    """Return the input size (C, H, W), the mean and the standard deviation that the model was made for."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if name in NAMED or config is None:
        size = (3, *NAMED[name].image) if name in NAMED and name not in SMALL else (3, 224, 224)
        return size, timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    return tuple(config.input_size), tuple(config.mean), tuple(config.std)


def describe(
    name: str,
    *,
    mixer: str | None = None,
    mlp: str | None = None,
    img_size: tuple[int, int] | None = None,
    in_chans: int = 3,
    num_classes: int = 1000,
    arguments: Mapping[str, Any] | None = None,
) -> ModelSpec:
    """The model `name` with other specs and sizes. `arguments` are timm's arguments of its constructor: those of our
    trunks by the names of their fields, those of a stock model as timm takes them, and the dropout rates of both.

    Raises:
        InputError: If there is no such model, or an argument is unknown or of another type.
        SpecError: If the description cannot be built.
    """
    check_model(name)
    others = dict(arguments or {})
    try:
        dropout = decode(Dropout, {key: others.pop(key) for key in DROPOUT if key in others}, "model_args")
        if name not in NAMED:
            if mlp is not None:
                raise SpecError(f"invalid mlp={mlp!r}; expected none for {name}, a stock model of timm")
            trunk = TimmTrunk(name=name, arguments=others)
            return ModelSpec(trunk=trunk, mixer=mixer, img_size=img_size, in_chans=in_chans, num_classes=num_classes,
                             dropout=dropout, name=name)  # fmt: skip
        spec, window, qk_norm = find(name), others.pop("window_size", None), others.pop("qk_norm", False)
        return replace(
            spec, trunk=_with_arguments(spec, others), mixer=_mixer(spec, mixer, window, qk_norm), mlp=mlp or spec.mlp,
            img_size=img_size or spec.img_size, in_chans=in_chans, num_classes=num_classes, dropout=dropout,
        )  # fmt: skip
    except SpecError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None


def _mixer(spec: ModelSpec, text: str | None, window: Any, qk_norm: Any) -> str:
    """The mixers of `spec`, changed by the specs or cells of `text`, with windows of another side and, with `qk_norm`,
    a LayerNorm of queries and keys."""
    stages = spec.stages
    if text is not None:
        specs = read_stages(text, len(stages), [stage.mixer for stage in stages])
    else:
        specs = tuple(stage.mixer for stage in stages)
    if type(qk_norm) is not bool:
        raise ValueError(f"invalid model_args.qk_norm={qk_norm!r}; expected bool")
    specs = tuple(map(with_qk_norm, specs)) if qk_norm else specs
    mixer = by_stage([str(mixer) for mixer in specs])
    if window is None:
        return mixer
    if type(window) is not int:
        raise ValueError(f"invalid model_args.window_size={window!r}; expected int")
    return with_window(mixer, window)


def _with_arguments(spec: ModelSpec, arguments: Mapping[str, Any]) -> Any:
    """The trunk of `spec` with other fields. Raises ValueError naming an unknown one, or one of another type."""
    known = [f.name for f in fields(spec.trunk)]
    for key in arguments:
        if key not in known:
            raise ValueError(f"unknown model_args {key!r}{suggest(key, known)}; expected one of {', '.join(known)}, "
                             f"{', '.join(DROPOUT)}")  # fmt: skip
    values = {f.name: getattr(spec.trunk, f.name) for f in fields(spec.trunk)} | dict(arguments)
    if isinstance(values["patch_size"], int):
        values["patch_size"] = (values["patch_size"],) * 2
    return decode(type(spec.trunk), {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
                  "model_args")  # fmt: skip


def described(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """`spec` with the mixers and MLPs that `model` has in the end."""
    mixer, mlp = specs_of(model)
    return replace(spec, mixer=mixer, mlp=mlp)


def specs_of(model: nn.Module) -> tuple[str | None, str | None]:
    """The specs of the model's mixers and MLPs as text, by stage where they differ; None for what it has none of."""
    if isinstance(model, PlainBackbone):
        blocks = [cast(Any, model.blocks)[0]]
    elif isinstance(model, HierarchicalBackbone):
        blocks = [cast(Any, stage).blocks[0] for stage in model.layers]
    else:
        report = getattr(model, "replaced", None)
        return (None if report is None else _joined(map(str, report.specs))), None
    stages = [block.specs for block in blocks]
    return _joined(str(s.mixer) for s in stages), _joined("none" if s.mlp is None else str(s.mlp) for s in stages)


def _joined(texts: Iterable[str]) -> str:
    return by_stage(list(texts))


# ---- the model -------------------------------------------------------------------------------------------


def create(spec: ModelSpec, weights: InitialWeights, *, seed: int) -> tuple[nn.Module, list[str]]:
    """Return the model with its weights, and notes on what became of the weights.

    Raises:
        InputError: If the model does not fit in memory, or the weights cannot be read or do not fit; nothing is loaded
            then.
        SpecError: If a mixer does not fit.
    """
    _check_size(spec)
    if weights.checkpoint is None:
        if weights.pretrained and not isinstance(spec.trunk, TimmTrunk):
            raise InputError(f"invalid --pretrained for {spec.name}, which has no published weights; expected "
                             "--initial-checkpoint FILE")  # fmt: skip
        model, notes = _seeded(spec, seed, weights.pretrained), []
    else:
        contents, source = open_model_file(Path(weights.checkpoint))
        before = spec if source is None else replace(spec, mixer=source.mixer, mlp=source.mlp)
        if source is not None and type(source.trunk) is not type(spec.trunk):
            raise InputError(f"initial_checkpoint: {weights.checkpoint} holds a model with a {source.trunk.family} "
                             f"trunk; expected a {spec.trunk.family} trunk, as {spec.name} has")  # fmt: skip
        model = _seeded(before, seed, False)
        notes = [*contents.notes, *load_weights(model, contents.state, weights.checkpoint)]
    if weights.mixer is not None:
        notes += str(replace_mixers(model, weights.mixer).replaced).splitlines()
    return model, notes


def _check_size(spec: ModelSpec) -> None:
    """Raise InputError if the parameters of a model of ours do not fit in memory."""
    trunk = spec.trunk
    if not isinstance(trunk, TimmTrunk):
        name = f"model {spec.name}"
        # a lower bound first: the closed form goes through all blocks
        check_memory(name, sum(depth * dim**2 for depth, dim in zip(trunk.depths, trunk.dims, strict=True)))
        check_memory(name, model_cost(spec).params)


def _seeded(spec: ModelSpec, seed: int, pretrained: bool) -> nn.Module:
    """The model with weights drawn from `seed`. Raises InputError if they do not fit in memory."""
    options = {"pretrained": True} if pretrained else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return build(spec, **options)
        except (RuntimeError, MemoryError, OverflowError) as error:
            raise InputError(f"model {spec.name} cannot be built: {one_line(error, 200)}") from None


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Load `state` into `model`, resampled to its resolution as in timm; a head of other classes keeps its new weights.
    Returns notes on the weights that stay new.

    Raises:
        InputError: If a tensor is missing, unknown or of another shape; nothing is loaded then.
    """
    fitted = dict(_filter(model)(dict(state), model))
    own = model.state_dict()
    classifier = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    head = {name for name, module in model.named_modules() if module is classifier}
    notes = []
    for name in [name for name in fitted if name.rpartition(".")[0] in head]:
        if name in own and fitted[name].shape != own[name].shape:
            notes.append(f"{name}: {list(fitted[name].shape)} in {source}, {list(own[name].shape)} in the model{NEW}")
            fitted[name] = own[name]
    if wrong := misfits(fitted, own):
        raise InputError(f"initial_checkpoint: {source} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}"
                         + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))  # fmt: skip
    model.load_state_dict(fitted)
    return notes


def misfits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Return why `state` cannot be loaded in place of `own`, one line per tensor; an empty list if it can."""
    return [
        *(f"{name} is missing" for name in own if name not in state),
        *(f"{name} is unknown" for name in state if name not in own),
        *(f"{name} has shape {list(state[name].shape)}; expected {list(own[name].shape)}"
          for name in own if name in state and state[name].shape != own[name].shape),
    ]  # fmt: skip


def _filter(model: nn.Module) -> Any:
    """timm's checkpoint filter of the model's family; a function that changes nothing if the family has none."""
    ours = isinstance(model, (PlainBackbone, HierarchicalBackbone))
    module = import_module("kernelbank.models" if ours else type(model).__module__)
    return getattr(module, "checkpoint_filter_fn", lambda state, model: state)
