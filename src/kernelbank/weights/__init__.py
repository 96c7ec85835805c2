"""Checkpoints of other libraries as ours and back: invertible key maps, and a proof on the same images."""
