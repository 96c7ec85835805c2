"""timm's names for the tensors of a mixer, declared once: the state-dict hook of `Mixer`, the reading of timm's
modules (nn/edit/stock.py) and the key maps of weights/ follow from it."""

from __future__ import annotations

FUSED = {"qkv": ("q", "key", "value")}
"""One linear of timm's that is several of ours, stacked along the outputs."""
RENAMED = {"proj": "out"}
"""The other linears of timm's attention."""
FFN = {"fc1": "key", "fc2": "value"}
"""The linears of timm's Mlp, which an FFN has."""
TABLE, OUR_TABLE = "relative_position_bias_table", "table.weight"
"""timm's relative table (offsets, h), offsets row by row; ours is (h, 2a-1, 2b-1)."""
INDEX = "relative_position_index"
"""A buffer of timm's that follows from the window."""

ATTENTION = {ours: theirs for theirs, names in FUSED.items() for ours in names} | {
    ours: theirs for theirs, ours in RENAMED.items()
}
"""Our linears of an attention -> timm's."""
