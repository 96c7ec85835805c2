"""Modules that torch.fx records as one call."""

from __future__ import annotations

from typing import Any, Self

import torch.fx
from torch import nn


class FxLeaf(nn.Module):
    """A module whose forward is ``function(self.fx_argument(x), x, ...)`` for a function given to `torch.fx.wrap`, so
    that torch.fx records it as one call, below other modules and as the module that is traced itself."""

    @property
    def fx_root(self) -> Self:
        """The module, under a name by which a graph can refer to the module that is traced."""
        return self

    def fx_argument(self, x: Any) -> Any:
        """Return the module, or a reference to it where `x` is traced by ``torch.fx.symbolic_trace(self)``.

        torch.fx refers to modules by their names, and that of the traced module is empty. The traced module then has
        this one as its submodule ``fx_root``.
        """
        if isinstance(x, torch.fx.Proxy) and getattr(x.tracer, "root", None) is self:
            return x.tracer.create_proxy("get_attr", "fx_root", (), {})
        return self
