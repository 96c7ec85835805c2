"""The model of a run from plain words: what a run's folder keeps, and what any of its weights can be loaded into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kernelbank.models  # noqa: F401  (registers ours with timm)
from kernelbank.atlas import MODELS, SKELETONS
from kernelbank.errors import InputError
from kernelbank.nn.backbone import HierarchicalBackbone, PlainBackbone, build
from kernelbank.nn.block import StageRecords
from kernelbank.nn.edit.replace import replace_mixers
from kernelbank.ops.plan import use_path
from kernelbank.text import suggest

OURS = {**MODELS, **SKELETONS}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that timm can create, or a skeleton of the atlas for small images (plain, hierarchical).

    `mixer` and `mlp` are records as text. In a stock model of timm, or one that starts from weights, `mixer` replaces
    the mixers that it has. `arguments` go to the model's constructor.
    """

    name: str
    mixer: str | None = None
    mlp: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    in_chans: int = 3
    img_size: int | None = None


@dataclass(frozen=True)
class Start:
    """Where weights come from before training: a file, timm's own, or nowhere."""

    checkpoint: str | None = None
    pretrained: bool = False

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.pretrained or self.checkpoint is not None


def check_model(name: str) -> None:
    """Raises InputError for a model that there is not."""
    if name not in SKELETONS and not timm.is_model(name.split(".", maxsplit=1)[0].rsplit("/", maxsplit=1)[-1]):
        known = [*OURS, *timm.list_models()]
        raise InputError(f"model: unknown model {name!r}{suggest(name, known)}; legal: {', '.join(OURS)}, and timm's")


def expected_input(name: str) -> tuple[tuple[int, int, int], tuple[float, ...], tuple[float, ...]]:
    """The input size, mean and standard deviation that the model was made for."""
    config = None if name in SKELETONS else timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None:
        return (3, 224, 224), timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    return tuple(config.input_size), tuple(config.mean), tuple(config.std)


def create(spec: ModelSpec, start: Start, *, seed: int, drop_path: float = 0.0) -> tuple[nn.Module, list[str]]:
    """The model with its weights, and what is worth telling about them. Raises InputError and SpecError."""
    if start.checkpoint is None:
        if spec.mixer is None or (spec.name in OURS and not start.pretrained):
            return _construct(spec, seed, drop_path, start.pretrained), []
        model = _construct(replace(spec, mixer=None), seed, drop_path, start.pretrained)
        return model, _replaced(model, spec.mixer)
    state, source = read_weights(Path(start.checkpoint))
    mixer, mlp = (None, None) if source is None else (source.mixer, source.mlp)
    before = replace(spec, mixer=mixer, mlp=spec.mlp or mlp)
    if source is not None and source.name != spec.name:
        raise InputError(f"initial_checkpoint: {start.checkpoint} holds {source.name}, not {spec.name}")
    model = _construct(before, seed, drop_path, False)
    notes = load_weights(model, state, start.checkpoint)
    if spec.mixer is not None:
        notes += _replaced(model, spec.mixer)
    return model, notes


def _construct(spec: ModelSpec, seed: int, drop_path: float, pretrained: bool) -> nn.Module:
    arguments: dict[str, Any] = {**spec.arguments, "num_classes": spec.num_classes, "in_chans": spec.in_chans}
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if spec.img_size is not None:
        arguments["img_size"] = spec.img_size
    if spec.name in OURS:
        arguments |= {name: text for name, text in (("mixer", spec.mixer), ("mlp", spec.mlp)) if text is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if spec.name in SKELETONS:
                if spec.img_size is None:
                    raise InputError(f"img_size: {spec.name} is made for any size; legal: --img-size")
                size = arguments.pop("img_size")
                mixer, mlp = arguments.pop("mixer", "vit"), arguments.pop("mlp", "ffn")
                return build(SKELETONS[spec.name], mixer, mlp, img_size=size, **arguments)
            return timm.create_model(spec.name, pretrained=pretrained, **arguments)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise InputError(
                f"model: {spec.name} cannot be built with {arguments}: {' '.join(str(error).split())}"
            ) from None


def _replaced(model: nn.Module, mixer: str) -> list[str]:
    return str(replace_mixers(model, mixer).replaced).splitlines()


def records_of(model: nn.Module) -> tuple[str | None, str | None]:
    """The records of the model's mixers and MLPs as text, by stage where they differ; None for what it has none of."""
    if isinstance(model, PlainBackbone):
        stages = [cast(StageRecords, model.blocks[0].records)]
    elif isinstance(model, HierarchicalBackbone):
        stages = [cast(StageRecords, cast(Any, stage).blocks[0].records) for stage in model.layers]
    else:
        replaced = getattr(model, "replaced", None)
        return (None if replaced is None else _joined(map(str, replaced.records))), None
    return _joined(str(s.mixer) for s in stages), _joined("none" if s.mlp is None else str(s.mlp) for s in stages)


def _joined(texts: Iterable[str]) -> str:
    by_stage = list(texts)
    return by_stage[0] if len(set(by_stage)) == 1 else " | ".join(by_stage)


def read_weights(path: Path) -> tuple[dict[str, Tensor], ModelSpec | None]:
    """The weights in a file, and the model they are of where a run wrote them. Raises InputError."""
    if not path.is_file():
        raise InputError(f"initial_checkpoint: {path} is no file")
    try:
        if path.suffix != ".safetensors":
            return load_state_dict(str(path)), None
        with safe_open(path, framework="pt") as file:
            spec = (file.metadata() or {}).get("model")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"initial_checkpoint: {path} holds no weights that can be read: {type(error).__name__}"
        ) from None
    return state, None if spec is None else ModelSpec(**json.loads(spec))


def load_weights(model: nn.Module, state: Mapping[str, Tensor], what: str) -> list[str]:
    """Put `state` into `model`, resampled to its resolution as timm does; a head of other classes stays new.

    Raises InputError for anything else that does not fit, naming it: nothing is loaded then.
    """
    fitted = dict(_filter(model)(dict(state), model))
    own = model.state_dict()
    classifier = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    head = {name for name, module in model.named_modules() if module is classifier}
    notes = []
    for name in [name for name in fitted if name.rpartition(".")[0] in head]:
        if fitted[name].shape != own[name].shape:
            notes.append(f"{name}: {list(fitted[name].shape)} in {what}, {list(own[name].shape)} here: new")
            fitted[name] = own[name]
    wrong = [*(f"{name} is missing" for name in own if name not in fitted),
             *(f"{name} is unknown" for name in fitted if name not in own),
             *(f"{name} has shape {list(fitted[name].shape)}, not {list(own[name].shape)}"
               for name in own if name in fitted and fitted[name].shape != own[name].shape)]  # fmt: skip
    if wrong:
        raise InputError(f"initial_checkpoint: {what} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}"
                         + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))  # fmt: skip
    model.load_state_dict(fitted)
    return notes


def _filter(model: nn.Module) -> Any:
    """timm's filter of the model's family; one that changes nothing for a model that timm did not create."""
    if not hasattr(model, "pretrained_cfg"):
        return lambda state, model: state
    ours = isinstance(model, (PlainBackbone, HierarchicalBackbone))
    module = import_module("kernelbank.models" if ours else type(model).__module__)
    return getattr(module, "checkpoint_filter_fn", lambda state, model: state)


def spec_metadata(spec: ModelSpec) -> dict[str, str]:
    """The metadata of a weights file, which `read_weights` reads."""
    return {"model": json.dumps(asdict(spec), sort_keys=True)}


def multiply_adds(model: nn.Module, spec: ModelSpec, size: tuple[int, int]) -> int:
    """Multiply-adds of one image, as torch's counter counts the model. Static convs run as F.linear for it: the
    counter does not know oneDNN's own, and the fastest form differs by machine."""
    was_training = model.training
    images = torch.zeros(1, spec.in_chans, *size, dtype=next(model.parameters()).dtype)
    with torch.no_grad(), use_path("linear"), FlopCounterMode(display=False) as counter:
        model.eval()(images)
    model.train(was_training)
    return int(counter.get_total_flops()) // 2
