"""What each path cannot serve, and where it is the one to take: one sentence a reason. Thresholds were measured, see
docs/performance.md; a reason names the number it was decided by."""

from __future__ import annotations

import torch

from kernelbank.ops.associated import affine, moments
from kernelbank.ops.context import Setting
from kernelbank.ops.expansion import LARGEST
from kernelbank.ops.linear import FORMS
from kernelbank.ops.machine import Machine
from kernelbank.ops.path import Call, first
from kernelbank.ops.pointwise import pointwise
from kernelbank.ops.sdpa import temperature
from kernelbank.ops.toeplitz import smooth
from kernelbank.spec import All, Dynamic, Full, Grouped, Predict, Project, Static, TwoStep, Window
from kernelbank.spec.inventory import bank_size

WORTH = 1.05
"""The gain over F.linear from which another form of a static conv is taken."""
EPILOGUE = 1.15
"""How much slower oneDNN's linear may be than another form: the GELU in its epilogue makes up for it."""
AHEAD = 1.5
"""The gain of oneDNN's linear over F.linear from which the products of attention, batched by torch, are run by it."""
ONEDNN_KERNELS = 256
"""Kernels above which they are large enough for it, one head at a time."""
LINEAR_TIME = 190
"""Kernels from which the closed form of a normaliser beats chunks of its map."""
DENSE, DENSE_TRAINED, DENSE_HALF = 300, 400, 1600
"""Positions up to which the N x N matrix of a table is the fastest: in float32, with gradients, in half precision."""
TRANSFORMED = 72
"""The side up to which making the hybrid's spectrum anew at every call is worth it."""


def _kernels(s: Setting) -> int:
    """n: how many kernels a position scores."""
    if isinstance(s.spec.mix, Project):
        return s.spec.mix.r
    return bank_size(s.spec, s.dim, s.geo.grid, s.geo.prefix)


def _two_step(s: Setting) -> str | None:
    return None if isinstance(s.spec.kernel, TwoStep) else f"it runs kernel two_step, not {s.spec.kernel}"


def _one_step(s: Setting) -> str | None:
    return "it runs one-step kernels, not two_step" if isinstance(s.spec.kernel, TwoStep) else None


def _everywhere(s: Setting) -> str | None:
    if s.mask is not None:
        return "an attn_mask hides kernels"
    return None if isinstance(s.geo.support, All) else f"support={s.geo.support} hides kernels"


def _no_dropout(s: Setting) -> str | None:
    return "it has no attention dropout" if s.training and s.attn_drop else None


def _half(call: Call) -> bool:
    return call.autocast or call.dtype in (torch.bfloat16, torch.float16)


class Mixers:
    """The mixer's paths."""

    @staticmethod
    def never(s: Setting, call: Call, m: Machine) -> str | None:
        """A path that is only ever forced."""
        return None

    @staticmethod
    def located(s: Setting) -> bool:
        """Whether there is a table."""
        return s.geo.sides is not None

    @staticmethod
    def one_step_everywhere(s: Setting) -> bool:
        """Whether a one-step kernel has a table over every position."""
        return s.geo.sides is not None and not isinstance(s.spec.kernel, TwoStep) and _everywhere(s) is None

    @staticmethod
    def vectorised(s: Setting, call: Call, m: Machine) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def fits_vectorised(s: Setting, call: Call, m: Machine) -> str | None:
        """Whatever is left."""
        if Mixers.one_step_everywhere(s):
            return "one kernel an image is a gate, and the table a positional operator"
        return "no path of its own is faster for this record here"

    @staticmethod
    def conv(s: Setting, call: Call, m: Machine) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def reference(s: Setting, call: Call, m: Machine) -> str | None:
        """Dropout."""
        return _no_dropout(s)

    @staticmethod
    def bottleneck(s: Setting, call: Call, m: Machine) -> str | None:
        """Dynamic banks and several heads."""
        if (reason := _two_step(s)) is not None:
            return reason
        if not isinstance(s.spec.bank, Static):
            return f"its kernels are parameters, not bank={s.spec.bank}"
        return None if s.heads == 1 else f"it is one pair of static convs, not {s.heads} heads"

    @staticmethod
    def fits_bottleneck(s: Setting, call: Call, m: Machine) -> str | None:
        """Always."""
        return "static kernels of one head are two static convs"

    @staticmethod
    def windows(s: Setting, call: Call, m: Machine) -> str | None:
        """Supports without regions, statistics across regions, patches of one-step kernels."""
        if not isinstance(s.geo.support, Window):
            return f"support={s.geo.support} has no regions"
        if s.mask is not None:
            return "an attn_mask hides kernels inside a region"
        if not isinstance(s.spec.kernel, TwoStep) and s.spec.size > 1:
            return f"a one-step kernel of size {s.spec.size} crosses the regions"
        if s.geo.prefix and any(step.axis == "positions" for step in s.spec.activation):
            return "@positions runs over queries of every region where a prefix is seen by all"
        if s.training and any(step.name == "batchnorm" for step in s.spec.activation):
            return "batchnorm has one set of statistics over all regions in training"
        return None

    @staticmethod
    def fits_windows(s: Setting, call: Call, m: Machine) -> str | None:
        """Always."""
        return "regions are small images of their own: no N x N tensor"

    @staticmethod
    def windows_sdpa(s: Setting, call: Call, m: Machine) -> str | None:
        """As windows and sdpa."""
        return first(_softmax(s), Mixers.windows(s, call, m))

    @staticmethod
    def fits_windows_sdpa(s: Setting, call: Call, m: Machine) -> str | None:
        """Always."""
        return "regions are small images of their own, and softmax is fused"

    @staticmethod
    def sdpa(s: Setting, call: Call, m: Machine) -> str | None:
        """Anything but a softmax over kernels."""
        return _softmax(s)

    @staticmethod
    def fits_sdpa(s: Setting, call: Call, m: Machine) -> str | None:
        """Always."""
        return "torch's fused attention holds no map"

    @staticmethod
    def associated(s: Setting, call: Call, m: Machine) -> str | None:
        """Activations that are not affine, hidden kernels."""
        if (reason := first(_two_step(s), _everywhere(s), _no_dropout(s))) is not None:
            return reason
        if affine(s.spec.activation, 1, 1) is None:
            return "the activation is not affine, so the products keep their order"
        return None

    @staticmethod
    def fits_associated(s: Setting, call: Call, m: Machine) -> str | None:
        """More kernels than channels a head."""
        n, d = _kernels(s), s.dim // s.heads * s.spec.size**2
        return f"q (k^T v) costs {d} a query, (q k^T) v {n}" if n > d else None

    @staticmethod
    def moments(s: Setting, call: Call, m: Machine) -> str | None:
        """Other activations, hidden kernels, half precision, compilers."""
        if (reason := first(_two_step(s), _everywhere(s), _no_dropout(s))) is not None:
            return reason
        steps = moments(s.spec.activation, 2, 2)
        if steps is None:
            return "the activation is not one normaliser over kernels between affine steps"
        if steps.before.shift and steps.normaliser in ("rmsnorm", "l2"):
            return f"a shift before {steps.normaliser} is not in its closed form"
        if "key.bias" in _static_names(s):
            return "a key bias is not in its closed form"
        if _half(call):
            return "sums of squares cancel in half precision"
        readable = not call.compiling and call.device != "meta"
        return None if readable else "its guard reads values, which a compiled graph and meta tensors have not"

    @staticmethod
    def fits_moments(s: Setting, call: Call, m: Machine) -> str | None:
        """Many kernels."""
        n = _kernels(s)
        return f"linear in {n} kernels (from {LINEAR_TIME} on)" if n >= LINEAR_TIME else None

    @staticmethod
    def pointwise(s: Setting, call: Call, m: Machine) -> str | None:
        """Other activations, hidden kernels, dropout."""
        if (reason := first(_two_step(s), _everywhere(s), _no_dropout(s))) is not None:
            return reason
        if pointwise(s.spec.activation, 2, 2) is None:
            return "the activation is not one non-linearity between affine steps"
        return "a compiler unrolls its chunks" if call.compiling else None

    @staticmethod
    def fits_pointwise(s: Setting, call: Call, m: Machine) -> str | None:
        """On CPUs."""
        return "chunks of the map stay in the cache" if call.device == "cpu" else None

    @staticmethod
    def pointwise_onednn(s: Setting, call: Call, m: Machine) -> str | None:
        """As pointwise; gradients, and whatever oneDNN's linear refuses."""
        return first(Mixers.pointwise(s, call, m), Forms.mkldnn(s, call, m))

    @staticmethod
    def fits_pointwise_onednn(s: Setting, call: Call, m: Machine) -> str | None:
        """Many kernels, on a machine where oneDNN is far ahead."""
        n, gain = _kernels(s), m.gain("mkldnn", call.tokens)
        fits = n > ONEDNN_KERNELS and gain >= AHEAD and call.dtype == torch.float32
        return f"{n} kernels, and oneDNN's linear is {gain:.2f}x as fast as F.linear" if fits else None

    @staticmethod
    def shifts(s: Setting, call: Call, m: Machine) -> str | None:
        """One kernel for all positions, size 1."""
        if (reason := _one_step(s)) is not None:
            return reason
        if not isinstance(s.spec.bank, Dynamic) or s.spec.size == 1:
            return "it runs generated kernels larger than 1"
        return "one kernel an image is a convolution" if _everywhere(s) is None else None

    @staticmethod
    def fits_shifts(s: Setting, call: Call, m: Machine) -> str | None:
        """Always."""
        return f"{s.spec.size**2} shifted maps instead of patches {s.spec.size**2} times as large"

    @staticmethod
    def images(s: Setting, call: Call, m: Machine) -> str | None:
        """What is not a predicted kernel."""
        if not isinstance(s.spec.mix, Predict) or isinstance(s.spec.kernel, Grouped):
            return "it runs kernels that are predicted for each image, full or depthwise"
        return None

    @staticmethod
    def fits_images(s: Setting, call: Call, m: Machine) -> str | None:
        """Wide maps."""
        wide = isinstance(s.spec.kernel, Full) and s.geo.grid[0] * s.geo.grid[1] > 400 and not call.compiling
        return "wide maps channels-last, image by image" if wide and call.device == "cpu" else None


def _softmax(s: Setting) -> str | None:
    if (reason := _two_step(s)) is not None:
        return reason
    return "the activation is not softmax over kernels" if temperature(s.spec.activation) is None else None


def _static_names(s: Setting) -> tuple[str, ...]:
    biased = isinstance(s.spec.bank, Static) and s.spec.bias and s.spec.frame == "bare"
    return ("key.bias",) if biased else ()


class Forms:
    """The forms of a static conv."""

    @staticmethod
    def any(s: object, call: Call, m: Machine) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def mkldnn(s: object, call: Call, m: Machine) -> str | None:
        """Gradients, other dtypes and devices, autocast, a torch without it."""
        if call.device != "cpu" or not m.fused:
            return f"torch's fused oneDNN linear does not work here ({m.reason or 'its trial failed'})"
        if call.grad:
            return "it has no gradient"
        if call.autocast:
            return "autocast does not reach it"
        if call.compiling:
            return "torch's compiler lowers it for frozen weights alone"
        return None if call.dtype in (torch.float32, torch.bfloat16) else f"it has no {call.dtype}"

    @staticmethod
    def fits_mkldnn(s: object, call: Call, m: Machine) -> str | None:
        """A machine where it is the fastest, or so near that its epilogue makes up for it."""
        return _gains("mkldnn", call, m, EPILOGUE)

    @staticmethod
    def fits_conv1x1(s: object, call: Call, m: Machine) -> str | None:
        """A machine where it is faster than F.linear."""
        return _gains("conv1x1", call, m) if call.device == "cpu" else None

    @staticmethod
    def fits_linear(s: object, call: Call, m: Machine) -> str | None:
        """Whatever is left."""
        return f"no other form is {WORTH}x as fast here" + (f" ({m.reason})" if m.reason else "")


def _gains(form: str, call: Call, m: Machine, behind: float = WORTH) -> str | None:
    """Why a form is taken in float32: its gain, as probed, is worth it, and no form that serves is `behind` times as
    fast."""
    if call.dtype != torch.float32 or call.autocast:
        return None
    able = [name for name in FORMS if name != "mkldnn" or Forms.mkldnn(None, call, m) is None]
    gain, best = m.gain(form, call.tokens), max(m.gain(name, call.tokens) for name in able)
    return f"{gain:.2f}x F.linear in the probe" if gain >= WORTH and gain * behind > best else None


class Positions:
    """The forms of the positional operator."""

    @staticmethod
    def any(s: Setting, call: Call, m: Machine) -> str | None:
        """Records whose table does not enter linearly, and hidden kernels."""
        if s.geo.sides is None:
            return "the record has no relative position"
        if (reason := _everywhere(s)) is not None:
            return reason
        if isinstance(s.spec.kernel, TwoStep):
            return None if affine(s.spec.activation, 2, 2) or moments(s.spec.activation, 2, 2) else (
                "the table is added to scores that go through a non-linearity"
            )  # fmt: skip
        return None

    @staticmethod
    def fits_dense(s: Setting, call: Call, m: Machine) -> str | None:
        """Few positions."""
        positions = s.geo.grid[0] * s.geo.grid[1]
        most = DENSE_HALF if _half(call) else DENSE_TRAINED if call.grad else DENSE
        return f"{positions} positions (up to {most}) make a matrix that fits" if positions <= most else None

    @staticmethod
    def fits_hybrid(s: Setting, call: Call, m: Machine) -> str | None:
        """Spectra that are kept, or small enough to be made at every call."""
        H, W = s.geo.grid
        fits = s.num_heads * H * 4 * W * W * 4 <= LARGEST if _keeps(call) else max(H, W) <= TRANSFORMED
        return (
            f"{H * W} positions: {H} frequencies of {2 * W} x {2 * W} products, transforms as products"
            if fits
            else None
        )

    @staticmethod
    def fits_hybrid_fft(s: Setting, call: Call, m: Machine) -> str | None:
        """Spectra that are kept: two numbers where the hybrid keeps four."""
        (H, W), h = s.geo.grid, s.num_heads
        fits = _keeps(call) and h * (smooth(2 * H - 1) // 2 + 1) * W * W * 8 <= LARGEST
        return f"{H * W} positions: about {H} frequencies of {W} x {W} products" if fits else None

    @staticmethod
    def fits_fourier(s: Setting, call: Call, m: Machine) -> str | None:
        """Whatever is left."""
        return f"{s.geo.grid[0]} x {s.geo.grid[1]} positions: two transforms, no product of W x W"


def _keeps(call: Call) -> bool:
    """Whether what is made of a table is kept for the next call (`ops.expansion`)."""
    return call.device == "cpu" and not call.grad and not call.compiling
