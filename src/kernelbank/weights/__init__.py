"""Convert checkpoints between this library and others, with invertible key maps and a comparison of outputs."""
