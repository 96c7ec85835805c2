"""KernelBank: vision backbones seen as dynamic convolutions (arXiv 2309.10713). Importing it imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernelbank.explanation.capture import explain
    from kernelbank.exports.export import export
    from kernelbank.huggingface import register_attention, set_attention
    from kernelbank.nn.accelerate import accelerate
    from kernelbank.nn.edit.dynamize import dynamize
    from kernelbank.nn.edit.replace import replace_mixers
    from kernelbank.nn.mixer import Mixer
    from kernelbank.ops.attend import attend
    from kernelbank.ops.paths.path import PathError
    from kernelbank.ops.plan import mix, use_path
    from kernelbank.spec import MixerSpec, SpecError
    from kernelbank.weights.from_timm import from_timm
    from kernelbank.weights.load import load

__version__ = "0.2.0"
__all__ = [
    "Mixer",
    "MixerSpec",
    "PathError",
    "SpecError",
    "accelerate",
    "attend",
    "dynamize",
    "explain",
    "export",
    "from_timm",
    "load",
    "mix",
    "register_attention",
    "replace_mixers",
    "set_attention",
    "use_path",
]

_HOMES = {
    "Mixer": "kernelbank.nn.mixer",
    "MixerSpec": "kernelbank.spec",
    "PathError": "kernelbank.ops.paths.path",
    "SpecError": "kernelbank.spec",
    "accelerate": "kernelbank.nn.accelerate",
    "attend": "kernelbank.ops.attend",
    "dynamize": "kernelbank.nn.edit.dynamize",
    "explain": "kernelbank.explanation.capture",
    "export": "kernelbank.exports.export",
    "from_timm": "kernelbank.weights.from_timm",
    "load": "kernelbank.weights.load",
    "mix": "kernelbank.ops.plan",
    "replace_mixers": "kernelbank.nn.edit.replace",
    "register_attention": "kernelbank.huggingface",
    "set_attention": "kernelbank.huggingface",
    "use_path": "kernelbank.ops.plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernelbank' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
