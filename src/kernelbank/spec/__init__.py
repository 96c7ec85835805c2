"""A token mixer as a spec: nine axes, their text, and what can be built. Imports no torch.

`axes` are the values, `pipeline` the activation steps, `mixer_spec` the spec itself, `legality` which values stand
beside each other, `support` which kernels a position sees, `inventory` every tensor by name and shape.
"""

from kernelbank.errors import SpecError
from kernelbank.spec.axes import (
    AXES,
    All,
    Box,
    Channels,
    Depthwise,
    Dynamic,
    Full,
    Grouped,
    Mean,
    Neighborhood,
    Own,
    Pool,
    Predict,
    Project,
    Stack,
    Static,
    TwoStep,
    Window,
)
from kernelbank.spec.mixer_spec import CELLS, MixerSpec, Reset, Support, read_mlps, read_stages
from kernelbank.spec.pipeline import STEPS, Pipeline, Step, roles

__all__ = [
    "AXES", "CELLS", "STEPS", "All", "Box", "Channels", "Depthwise", "Dynamic", "Full", "Grouped", "Mean", "MixerSpec",
    "Neighborhood", "Own", "Pipeline", "Pool", "Predict", "Project", "Reset", "SpecError", "Stack", "Static", "Step",
    "Support", "TwoStep", "Window", "read_mlps", "read_stages", "roles",
]  # fmt: skip
