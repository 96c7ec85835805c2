"""`attend`: the activation between two matrix products, for queries, keys and values that are computed elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.errors import SpecError
from kernelbank.ops.activation import activate
from kernelbank.ops.precision import wide
from kernelbank.spec.pipeline import Pipeline, read_pipeline, softmax

_SOFTMAX = softmax()
_LINEAR = read_pipeline("identity,count")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pipeline: str = "softmax",
    *,
    bias: Tensor | None = None,
    visible: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    r"""Return o_i = sum_j phi(scale q_i . k_j + b_ij) v_j over the visible j (arXiv 2309.10713, section 4.1).

    Softmax runs as torch's scaled_dot_product_attention. ``identity,count`` without a bias, hidden kernels and dropout
    is q (k^T v) / n. Other pipelines write the map.

    Args:
        q: Queries, (B, h, T, d).
        k: The first kernels, (B, h, n, d).
        v: The second kernels, (B, h, n, e).
        pipeline: phi, the steps of an activation: ``relu,count``, ``layernorm,count``, ``softmax``. Not ``batchnorm``,
            which has parameters.
        bias: b, broadcastable to (B, h, T, n).
        visible: The kernels that each query sees, booleans broadcastable to (B, h, T, n). A query that sees none gets
            zeros.
        scale: 1 / sqrt(d) with None.
        dropout: The rate at which entries of the map are dropped.

    Returns:
        (B, h, T, e), in the dtype of `v`.

    Raises:
        SpecError: For shapes, dtypes or a pipeline that cannot be used.
    """
    steps = checked_pipeline(pipeline)
    _check(q, k, v, visible, dropout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if steps == _SOFTMAX:
        return _softmax(q, k, v, bias, visible, scale, dropout)
    if steps == _LINEAR and bias is None and visible is None and not dropout:
        return (q * (scale / k.shape[2])) @ (k.mT @ v)
    scores = (q * scale) @ k.mT
    a = activate(scores if bias is None else scores.to(wide(scores.dtype)) + bias, visible, steps, {}, False)
    return F.dropout(a.to(v.dtype), dropout, training=True) @ v if dropout else a.to(v.dtype) @ v


def checked_pipeline(text: str) -> Pipeline:
    """The steps of `text`. Raises SpecError for one that cannot be used outside a mixer."""
    steps = read_pipeline(text) if isinstance(text, str) else ()
    if not steps:
        raise SpecError(f"invalid pipeline={text!r}; expected steps of an activation, such as relu,count")
    if any(step.name == "batchnorm" for step in steps):
        raise SpecError(f"invalid pipeline={text!r}: batchnorm has parameters; expected a step without")
    return steps


def _softmax(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, visible: Tensor | None, scale: float, dropout: float
) -> Tensor:
    mask = visible
    if bias is not None:
        mask = bias.to(q.dtype) if visible is None else bias.to(q.dtype).masked_fill(~visible, -torch.inf)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return o if visible is None else o.masked_fill(~visible.any(-1, keepdim=True), 0)


def _check(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout: float) -> None:
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise SpecError(f"invalid {name} of shape {tuple(tensor.shape)}; expected (batch, heads, tokens, channels)")
    if q.shape[:2] != k.shape[:2] or k.shape[:3] != v.shape[:3] or q.shape[-1] != k.shape[-1]:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise SpecError(f"invalid shapes {shapes} of q, k and v; expected (B, h, T, d), (B, h, n, d) and (B, h, n, e)")
    if visible is not None and visible.dtype != torch.bool:
        raise SpecError(f"invalid visible of dtype {visible.dtype}; expected torch.bool (a float mask is a bias)")
    if not 0 <= dropout < 1:
        raise SpecError(f"invalid dropout={dropout}; expected 0 <= dropout < 1")
