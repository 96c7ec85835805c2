"""timm's names for the tensors of a mixer. The load hook of `Mixer`, the reading of timm's modules (nn/edit/stock.py)
and the key maps in weights/ use them."""

from __future__ import annotations

FUSED = {"qkv": ("q", "key", "value")}
"""A linear layer of timm that is several of ours, concatenated along the outputs."""
RENAMED = {"proj": "out"}
"""The other linear layers of timm's attention."""
FFN = {"fc1": "key", "fc2": "value"}
"""The linear layers of timm's Mlp, for an FFN."""
TABLE, OUR_TABLE = "relative_position_bias_table", "table.weight"
"""timm's relative table (offsets, h), with the offsets row by row, and ours (h, 2a-1, 2b-1)."""
INDEX = "relative_position_index"
"""A buffer of timm that the window determines."""

ATTENTION = {ours: theirs for theirs, names in FUSED.items() for ours in names} | {
    ours: theirs for theirs, ours in RENAMED.items()
}
"""Our linear layers of attention -> timm's."""
