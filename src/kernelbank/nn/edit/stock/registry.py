"""The adapter for each class of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from torch import nn

from kernelbank.errors import InputError
from kernelbank.nn.edit.stock import hiera, maps, naflex, partitions, swin, tokens
from kernelbank.nn.edit.stock.found import Adapter, BlockAttention, LeftAttention
from kernelbank.text import suggest

ADAPTERS: Mapping[str, Adapter] = MappingProxyType({
    "VisionTransformer": tokens.vit,
    "Eva": tokens.eva,
    "Qwen3VitEncoder": tokens.encoder,
    "Qwen3VitClassifier": tokens.classifier,
    "DeepseekVitEncoder": tokens.encoder,
    "DeepseekVitClassifier": tokens.classifier,
    "NaFlexVit": naflex.naflexvit,
    "Beit": tokens.beit,
    "VisionTransformerRelPos": tokens.relpos,
    "SwinTransformer": swin.swin,
    "SwinTransformerV2": swin.swin_v2,
    "MaxxVit": partitions.maxvit,
    "TinyVit": partitions.tiny_vit,
    "DaVit": partitions.davit,
    "Twins": partitions.twins,
    "MetaFormer": maps.metaformer,
    "FastVit": partial(maps.attention_on_maps, leaf="token_mixer"),
    "Visformer": partial(maps.attention_on_maps, leaf="attn"),
    "ConvNeXt": maps.convnext,
    "Hiera": hiera.hiera,
})  # fmt: skip
"""The adapters by the name of timm's class; a subclass has that of its nearest base."""


def block_attentions(model: nn.Module) -> Iterator[BlockAttention]:
    """Yield the token mixer of every block without changing the model. Stages are numbered from 0; those without a
    token mixer that a spec describes do not count.

    Raises: InputError: For a model or a token mixer that no spec describes; the error names the module.
    """
    found = [one for one in _adapter(model)(model) if isinstance(one, BlockAttention)]
    order = {stage: number for number, stage in enumerate(sorted({one.stage for one in found}))}
    return (replace(one, stage=order[one.stage]) for one in found)


def left_attentions(model: nn.Module) -> Iterator[LeftAttention]:
    """Yield the token mixers that `block_attentions` leaves out, with the reasons."""
    return (found for found in _adapter(model)(model) if isinstance(found, LeftAttention))


def has_adapter(model: nn.Module) -> bool:
    """Whether `block_attentions` knows the class of `model`."""
    return _find(model) is not None


def _find(model: nn.Module) -> Adapter | None:
    classes = (kind.__name__ for kind in type(model).__mro__ if kind.__name__ in ADAPTERS)
    return next((ADAPTERS[name] for name in classes), None)


def _adapter(model: nn.Module) -> Adapter:
    adapter = _find(model)
    if adapter is None:
        name = type(model).__name__
        raise InputError(f"model: invalid class {name}{suggest(name, ADAPTERS)}; expected timm's "
                         f"{', '.join(ADAPTERS)}, or a KernelBank backbone")  # fmt: skip
    return adapter
