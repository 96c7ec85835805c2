"""Read the token mixers of timm's models as mixers with the same weights, and put other mixers in their place.

An adapter for each family of models finds the token mixers of its blocks (`registry`). What they share is in `read`
(weights under our names), `seats` (mixers that take the arguments of the module that they replace) and `grids` (the
sizes of feature maps).
"""

from kernelbank.nn.edit.stock.found import BlockAttention, LeftAttention
from kernelbank.nn.edit.stock.read import head_norm_kind
from kernelbank.nn.edit.stock.registry import ADAPTERS, block_attentions, has_adapter, left_attentions
from kernelbank.nn.edit.stock.seats import AttentionMixer, SeatedMixer

__all__ = [
    "ADAPTERS",
    "AttentionMixer",
    "BlockAttention",
    "LeftAttention",
    "SeatedMixer",
    "block_attentions",
    "has_adapter",
    "head_norm_kind",
    "left_attentions",
]
