"""KernelBank: vision backbones seen as dynamic convolutions (arXiv 2309.10713). Importing it imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelbank.nn.dynamize import dynamize
    from kernelbank.nn.mixer import Mixer
    from kernelbank.nn.replace import replace_mixers
    from kernelbank.ops.plan import PathError, mix, use_path
    from kernelbank.spec import MixerSpec, SpecError

__version__ = "0.1.0"
__all__ = ["Mixer", "MixerSpec", "PathError", "SpecError", "dynamize", "mix", "replace_mixers", "use_path"]

_HOMES = {
    "Mixer": "kernelbank.nn.mixer",
    "MixerSpec": "kernelbank.spec",
    "PathError": "kernelbank.ops.plan",
    "SpecError": "kernelbank.spec",
    "dynamize": "kernelbank.nn.dynamize",
    "mix": "kernelbank.ops.plan",
    "replace_mixers": "kernelbank.nn.replace",
    "use_path": "kernelbank.ops.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernelbank' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
