"""The linear layers: by oneDNN's fused linear, as 1 x 1 convolutions, or by F.linear."""

from __future__ import annotations

import torch

from kernelbank.ops.context import Call
from kernelbank.ops.linear import FORMS
from kernelbank.ops.machine import Machine
from kernelbank.ops.paths.path import LinearPath, Reason

WORTH = 1.05
"""The speed relative to F.linear from which another form is preferred."""
EPILOGUE = 1.15
"""How much slower oneDNN's linear may be than another form: the GELU in its epilogue makes up for it."""


def supports_all(call: Call, m: Machine) -> Reason:
    """Every call is supported."""
    return None


def onednn_unsupported(call: Call, m: Machine) -> Reason:
    """Not supported by oneDNN's fused linear: gradients, autocast, other dtypes, compilers."""
    if call.device != "cpu" or not m.fused:
        return f"torch's fused oneDNN linear does not work ({m.reason or 'its trial failed'})"
    if call.grad or call.transformed:
        return "it has no derivative"
    if call.autocast:
        return "autocast does not reach it"
    if call.compiling:
        return "torch's compiler lowers it for frozen weights alone"
    return None if call.dtype in (torch.float32, torch.bfloat16) else f"it does not support {call.dtype}"


def onednn_preferred(call: Call, m: Machine) -> Reason:
    """Preferred if it is the fastest form in the probe, or nearly."""
    return _gain("mkldnn", call, m, EPILOGUE)


def conv1x1_preferred(call: Call, m: Machine) -> Reason:
    """Preferred if it is the fastest form in the probe, outside graphs and transforms."""
    plain = call.compiling or call.transformed
    return _gain("conv1x1", call, m) if call.device == "cpu" and not plain else None


def plain_preferred(call: Call, m: Machine) -> Reason:
    """Preferred if no other form is."""
    if call.compiling or call.transformed:
        return "compilers and transforms see through it"
    return f"no other form is {WORTH} times as fast" + (f" ({m.reason})" if m.reason else "")


def _gain(form: str, call: Call, m: Machine, behind: float = WORTH) -> Reason:
    """Why a form is preferred in the dtype of the probe: its speed there is worth it, and no supported form is `behind`
    times as fast."""
    if call.dtype != m.dtype or call.autocast:
        return None
    supported = [name for name in FORMS if name != "mkldnn" or onednn_unsupported(call, m) is None]
    gain, best = m.gain(form, call.tokens), max(m.gain(name, call.tokens) for name in supported)
    return f"{gain:.2f}x F.linear in the probe" if gain >= WORTH and gain * behind > best else None


PATHS = (
    LinearPath("mkldnn", FORMS["mkldnn"], onednn_unsupported, onednn_preferred),
    LinearPath("conv1x1", FORMS["conv1x1"], supports_all, conv1x1_preferred),
    LinearPath("linear", FORMS["linear"], supports_all, plain_preferred),
)
