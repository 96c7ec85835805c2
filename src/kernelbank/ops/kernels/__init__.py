"""Triton kernels of the operator for GPUs, each a `torch.library` operator ``kernelbank::NAME`` beside its naive form.

`pointwise` is attention with a pointwise activation, `moments` attention with LayerNorm or RMSNorm over the kernels,
`depthwise` depth-wise self-attention, and `regions` attention inside small windows. `gradients` and `table` are the
backward kernels that the first two share. An operator runs its kernel on CUDA tensors, and on CPU tensors in Triton's
interpreter (``TRITON_INTERPRET=1``); elsewhere it runs its naive form. docs/gpu.md has the equations.
"""
