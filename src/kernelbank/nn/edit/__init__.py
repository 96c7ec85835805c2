"""Editing trained models: other mixers in their blocks, dynamic convolutions in their ConvNets."""
