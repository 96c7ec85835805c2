"""Modules: `mixer`, the only token-mixing module, and the backbones that hold it."""
