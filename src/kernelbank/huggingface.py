"""Any activation as the attention of Hugging Face Transformers, through its `AttentionInterface`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.ops.attend import attend, checked_pipeline
from kernelbank.spec.pipeline import show_pipeline
from kernelbank.weights.dialects.dialect import need

PIPELINES = (
    "softmax", "relu,count", "layernorm,count", "identity,count", "relu2,count", "sigmoid,count", "exp,count", "l1",
    "relu,l1", "softmax@positions",
)  # fmt: skip
"""What `register_attention` registers without arguments."""


REFUSED = ("softcap", "s_aux")
"""Options of Transformers' attention that change the map in other ways: a cap of the scores, and a sink."""


def register_attention(*pipelines: str) -> tuple[str, ...]:
    """Register activations as attention implementations of Transformers, and return their names.

    The names are ``kernelbank:`` and the pipeline, for ``attn_implementation=`` of a model's constructor or
    ``from_pretrained``, and for ``model.set_attn_implementation``. Masks are honoured as visibility: a boolean mask,
    and entries of a float mask at its dtype's minimum or below. Other entries of a float mask are a bias, as relative
    positions are. A model whose attention does not go through the interface ignores the name, or refuses it:
    `set_attention` makes that an error::

        kernelbank.register_attention("relu,count")
        model = AutoModel.from_pretrained(NAME, attn_implementation="kernelbank:relu,count")

    Args:
        pipelines: The activations, as in a spec. With none, those of `PIPELINES`.

    Raises:
        SpecError: For a pipeline that does not exist or has parameters.
        MissingLibraryError: Without transformers (the extra hf).
    """
    texts = [show_pipeline(checked_pipeline(text)) for text in pipelines or PIPELINES]
    need("transformers")
    transformers = import_module("transformers")
    masks = import_module("transformers.masking_utils")
    for text in texts:
        transformers.AttentionInterface.register(f"kernelbank:{text}", _attention(text))
        transformers.AttentionMaskInterface.register(f"kernelbank:{text}", masks.sdpa_mask)
    return tuple(f"kernelbank:{text}" for text in texts)


def set_attention(model: nn.Module, pipeline: str) -> nn.Module:
    """Run the attention of a model of Transformers with another activation, in place, and return the model. The weights
    stay.

    Args:
        model: A PreTrainedModel.
        pipeline: The activation, as in a spec: ``relu,count``.

    Raises:
        InputError: For another object, and for a model whose attention does not go through the interface (Swin V2,
            PVT v2, Hiera). The model is then unchanged.
        SpecError: For a pipeline that does not exist or has parameters.
    """
    (name,) = register_attention(pipeline)
    if not isinstance(model, import_module("transformers").PreTrainedModel):
        raise InputError(f"invalid model: a {type(model).__name__}; expected a PreTrainedModel of transformers")
    if not _goes_through(model):
        raise InputError(f"invalid model: the attention of {type(model).__name__} does not go through Transformers' "
                         "AttentionInterface; expected a model that supports attn_implementation")  # fmt: skip
    model.set_attn_implementation(name)
    return model


def _goes_through(model: Any) -> bool:
    """Whether Transformers says that the model, and every model inside it, calls the interface."""
    inside = [module for module in model.modules() if hasattr(module, "_supports_attention_backend")]
    return all(module._supports_attention_backend for module in inside)


def _attention(pipeline: str) -> Any:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
        position_bias: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Transformers' interface: (B, h, T, d) -> ((B, T, h, d), no map)."""
        if unknown := [name for name in REFUSED if options.get(name) is not None]:
            raise InputError(f"invalid {unknown[0]} of {type(module).__name__}, which {pipeline} would drop; "
                             "expected a model without")  # fmt: skip
        groups = getattr(module, "num_key_value_groups", 1)
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
        bias, visible = split_mask(attention_mask)
        if position_bias is not None:
            bias = position_bias if bias is None else bias + position_bias
        if causal and attention_mask is None and query.shape[2] > 1:
            visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
        o = attend(query, key, value, pipeline, bias=bias, visible=visible, scale=scaling, dropout=dropout)
        return o.transpose(1, 2).contiguous(), None

    return attention


def split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask of Transformers as (bias, visible): booleans say what is visible; in a float mask entries at the minimum
    of its dtype or below hide a kernel, and the others are added to the scores."""
    if mask is None or mask.dtype == torch.bool:
        return None, mask
    visible = mask > torch.finfo(mask.dtype).min
    return mask.masked_fill(~visible, 0), visible
