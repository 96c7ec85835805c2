"""The specification of a token mixer: nine axes, their text, and which values fit together. Imports no torch.

- `axes`, `arguments`, `pipeline`: the values of each axis, their arguments, and the steps of the activation
- `mixer_spec`: `MixerSpec`, its text and JSON; `legality`: which cells can be built together
- `support`: which kernels a position sees; `inventory`: every tensor by name and shape
"""

from kernelbank.errors import SpecError
from kernelbank.spec.arguments import Channels
from kernelbank.spec.axes import (
    AXES,
    All,
    Box,
    Depthwise,
    Dilated,
    Dynamic,
    Full,
    Grouped,
    Mean,
    Neighborhood,
    NoPosition,
    Own,
    Pool,
    Predict,
    Project,
    Relative,
    Rope,
    Stack,
    Static,
    TwoStep,
    Window,
)
from kernelbank.spec.mixer_spec import CELLS, MixerSpec, Reset, Support, read_mlps, read_stages
from kernelbank.spec.pipeline import STEPS, Pipeline, Step, roles

__all__ = [
    "AXES", "CELLS", "STEPS", "All", "Box", "Channels", "Depthwise", "Dilated", "Dynamic", "Full", "Grouped", "Mean",
    "MixerSpec", "Neighborhood", "NoPosition", "Own", "Pipeline", "Pool", "Predict", "Project", "Relative", "Reset",
    "Rope", "SpecError", "Stack", "Static", "Step", "Support", "TwoStep", "Window", "read_mlps", "read_stages", "roles",
]  # fmt: skip
