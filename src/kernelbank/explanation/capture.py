"""`explain`: the maps and kernels of a model's mixers on images, recomputed from what each of them takes in."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.explanation.layer import LayerMaps
from kernelbank.explanation.maps import Wanted, layer_maps
from kernelbank.nn.block import narrowed
from kernelbank.nn.edit.stock import SeatedMixer, block_attentions, has_adapter
from kernelbank.nn.mixer import Mixer
from kernelbank.spec.inventory import Grid
from kernelbank.text import suggest

Inputs = tuple[Tensor, Grid, Tensor | None]
"""What a mixer takes in: tokens (B, T, C), their grid and a mask."""
Layers = Sequence[int | str]
"""Layers by number, in the order of the model, or by name."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """The maps of some layers of a model, in the order of the model, and the model's `output`."""

    layers: tuple[LayerMaps, ...]
    output: Any

    def __getitem__(self, key: int | str) -> LayerMaps:
        """A layer by its place among those that were asked for, or by name. Raises KeyError, IndexError."""
        if isinstance(key, int):
            return self.layers[key]
        for layer in self.layers:
            if layer.name == key:
                return layer
        raise KeyError(key)

    def __iter__(self) -> Iterator[LayerMaps]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Watched:
    """A mixer, its name, the `module` that is watched and how its inputs are read from a call of that module: a
    function of the arguments, or of the result with `after`."""

    name: str
    mixer: Mixer
    module: nn.Module
    read: Callable[..., Inputs]
    after: bool = False


def explain(
    model: nn.Module,
    images: Tensor,
    layers: Layers | None = None,
    heads: Sequence[int] | None = None,
    positions: Wanted | None = None,
) -> Explanation:
    """Return the maps and kernels of the mixers of `model` on `images`.

    The model runs once, in eval mode and without gradients, on the paths that it runs on anyway. What each mixer takes
    in is kept, and its map is computed from that by the definition. The model, its mode, its hooks and the state of the
    random number generators are afterwards as before. Linear layers of a mixer with hooks or an adapter are called a
    second time for its map.

    Args:
        model: A backbone of this library, a model of timm with an adapter (``kernelbank atlas --coverage``), any module
            that contains a `Mixer`, or a `Mixer` alone (then `images` are tokens).
        images: The model's input, (B, C, H, W).
        layers: Numbers, in the order of the model, or names such as ``blocks.3.attn``. All token mixers with None.
        heads: The heads. All of them with None.
        positions: Token numbers, prefix first, or (row, column) pairs. All of them with None. Memory is bounded by
            layers x heads x positions x the kernels that a position sees. The maps of activations over positions
            (``softmax@positions``) are computed for all positions before those that were asked for are taken.

    Raises:
        InputError: If the model has no mixers, an attention that no spec holds, no such layer, head or position, or a
            BatchNorm in training mode.
        SpecError: If the images do not fit the model.
    """
    model = _with_mixers(getattr(model, "_orig_mod", model))
    watched = _selected(list(_watched(model, images)), layers, model)
    _check_mode(model)
    inputs: dict[str, Inputs] = {}
    with _running(model), ExitStack() as stack:
        for one in watched:
            stack.callback(_watch(one, inputs).remove)
        output = model(images)
        stack.close()
        found = _maps(watched, inputs, heads, positions)
    return Explanation(found, output)


def _maps(
    watched: list[Watched], inputs: dict[str, Inputs], heads: Sequence[int] | None, positions: Wanted | None
) -> tuple[LayerMaps, ...]:
    """The maps of every layer. Each input is let go after its layer. Raises InputError for one that was not called."""
    if missing := [one.name for one in watched if one.name not in inputs]:
        raise InputError(f"invalid layer {missing[0]}, which the model does not call; expected another")
    return tuple(layer_maps(one.name, one.mixer, *inputs.pop(one.name), heads, positions) for one in watched)


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; its mode and the random number generators are restored."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _check_mode(model: nn.Module) -> None:
    """Raise InputError for a BatchNorm in training mode: what it computes depends on the batch."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        steps = module.spec.activation if isinstance(module, Mixer) else ()
        inside = isinstance(module, Mixer) and module.spec.frame == "bn_relu"
        inside = inside or any(step.name == "batchnorm" for step in steps)
        if inside or isinstance(module, nn.modules.batchnorm._BatchNorm):
            place = name or type(model).__name__
            raise InputError(f"invalid model in training mode with a BatchNorm in {place}, whose maps depend on the "
                             "batch; expected model.eval()")  # fmt: skip


# ---- the mixers of a model -------------------------------------------------------------------------------

_WATCHED_AS_THEY_ARE = (VisionTransformer, SwinTransformer)
"""Models of timm whose attention is watched where it is."""


def _with_mixers(model: nn.Module) -> nn.Module:
    """`model`, or for other models of timm with an adapter a copy in which mixers with the same weights stand."""
    if isinstance(model, _WATCHED_AS_THEY_ARE) or not has_adapter(model):
        return model
    stock = [model.get_submodule(attention.name) for attention in block_attentions(model)]
    model = copy.deepcopy(model, {id(module): module for module in stock})
    for attention in list(block_attentions(model)):
        attention.place(attention.spec, attention.mixer)
    return model


def _watched(model: nn.Module, images: Tensor) -> Iterator[Watched]:
    """The token mixers of the model. Raises InputError for an attention that no spec holds."""
    if not isinstance(model, _WATCHED_AS_THEY_ARE):
        yield from (w for w in _every_mixer(model) if w.name.rpartition(".")[2] != "mlp")
        return
    for attention in block_attentions(model):
        name, owner = attention.name, attention.name.rpartition(".")[0]
        stock = model.get_submodule(name)
        if isinstance(stock, Mixer):
            yield Watched(name, stock, stock, _reader(stock))
        elif isinstance(model, SwinTransformer):
            yield Watched(name, attention.mixer, model.get_submodule(f"{owner}.norm1"), _read_map, after=True)
        else:
            yield Watched(name, attention.mixer, stock, _token_reader(stock, _patch_grid(model, images)))


def _every_mixer(model: nn.Module) -> Iterator[Watched]:
    """Every Mixer of the model, those in the place of an MLP included."""
    for name, module in model.named_modules():
        if isinstance(module, Mixer):
            yield Watched(name, module, module, _reader(module))


def _selected(watched: list[Watched], layers: Layers | None, model: nn.Module) -> list[Watched]:
    """The layers that were asked for, in the order of the model. Raises InputError for unknown ones, and if there are
    none."""
    if not watched:
        raise InputError(f"invalid model without mixers: {type(model).__name__}; expected a backbone of kernelbank, "
                         "a model of timm with an adapter, or a module with a Mixer")  # fmt: skip
    if layers is None:
        return watched
    by_name = {one.name: one for one in [*_every_mixer(model), *watched]}
    names = []
    for layer in layers:
        if isinstance(layer, int) and not isinstance(layer, bool) and -len(watched) <= layer < len(watched):
            names.append(watched[layer].name)
        elif isinstance(layer, str) and layer in by_name:
            names.append(layer)
        else:
            raise InputError(f"unknown layer {layer!r}{suggest(str(layer), by_name)}; expected 0 to {len(watched) - 1} "
                             f"or a name from {watched[0].name} to {watched[-1].name}")  # fmt: skip
    return [one for name, one in by_name.items() if name in names]


# ---- what a mixer takes in -------------------------------------------------------------------------------


def _watch(one: Watched, inputs: dict[str, Inputs]) -> Any:
    """A hook that keeps what the mixer takes in."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[one.name] = _kept(one.read(*args, **kwargs))

    def after(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> None:
        inputs[one.name] = _kept(one.read(result))

    if one.after:
        return one.module.register_forward_hook(after)
    return one.module.register_forward_pre_hook(before, with_kwargs=True)


def _kept(inputs: Inputs) -> Inputs:
    """A copy, since the model may write over its tokens."""
    return inputs[0].detach().clone(), inputs[1], inputs[2]


def _reader(mixer: Mixer) -> Callable[..., Inputs]:
    """How the inputs of a Mixer are read from the arguments of its forward."""
    if isinstance(mixer, SeatedMixer):
        return mixer.inputs
    signature = inspect.signature(mixer.forward)

    def read(*args: Any, **kwargs: Any) -> Inputs:
        given = signature.bind(*args, **kwargs).arguments
        x, mask = given["x"], given.get("attn_mask")
        return x, given.get("grid") or mixer.grid, mask

    return read


def _token_reader(attention: nn.Module, grid: Grid) -> Callable[..., Inputs]:
    """How the inputs of timm's Attention are read from the arguments of its forward."""
    signature = inspect.signature(attention.forward)

    def read(*args: Any, **kwargs: Any) -> Inputs:
        given = signature.bind(*args, **kwargs).arguments
        x = given["x"]
        return x, grid, narrowed(x, given.get("attn_mask"), given.get("is_causal", False))

    return read


def _read_map(normed: Tensor) -> Inputs:
    """The input of a window attention of timm's is the normed map (B, H, W, C), before it is rolled and cut."""
    _, height, width, _ = normed.shape
    return normed.flatten(1, 2), (height, width), None


def _patch_grid(model: Any, images: Tensor) -> Grid:
    """The grid of patches of a ViT on `images`."""
    height, width = model.patch_embed.grid_size
    if model.dynamic_img_size:
        height, width = model.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return height, width
