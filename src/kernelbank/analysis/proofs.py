"""The identities behind the table: statements that are checked on random inputs in float64.

They follow the paper, sections 4.2 and 5.3, and the published code of each method. The tests run the same list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernelbank.atlas import ROWS
from kernelbank.nn.mixer import Mixer
from kernelbank.ops.context import Context
from kernelbank.ops.geometry import visibility
from kernelbank.ops.plan import use_path
from kernelbank.ops.position import relative
from kernelbank.spec import STEPS, MixerSpec
from kernelbank.spec.support import seen

TOLERANCE = 1e-9
DIM, HEADS, BATCH = 8, 2, 2
SUPPORTS = ("all", "window(3, shift=1)", "grid(3)", "neighborhood(3)", "self")
PIPELINES = (
    "softmax", "softmax(2)", "exp,l2", "softmax@positions,l1", "scale(-0.5),log_count",
    *(f"{name},count" for name in STEPS if name != "scale"),
)  # fmt: skip


@dataclass(frozen=True)
class ProofResult:
    """The outcome for one identity: its statement and the largest error, relative to 1 + the largest value. A tolerance
    of 0 asks for bit-equality."""

    name: str
    statement: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Identity:
    """A statement and the function that measures its error."""

    statement: str
    error: Callable[[], float]
    tolerance: float = TOLERANCE


def prove(name: str) -> ProofResult:
    """Check one identity of `PROOFS` on fixed random inputs. Raises: KeyError: If it is unknown."""
    identity = PROOFS[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return ProofResult(name, identity.statement, identity.error(), identity.tolerance)


# ---- random mixers and inputs ----------------------------------------------------------------------------


def random_mixer(
    spec: MixerSpec | str, grid: tuple[int, int] = (4, 5), prefix: int = 0, dim: int = DIM, heads: int = HEADS
) -> Mixer:
    """Return a float64 mixer in evaluation mode with random parameters and statistics, no variance near zero."""
    mixer = Mixer(spec, dim, heads, grid, prefix=prefix, dtype=torch.float64).eval()
    with torch.no_grad():
        for name, tensor in mixer.tensors().items():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) / 2)
    return mixer


def tokens(mixer: Mixer) -> Tensor:
    """Return random float64 tokens for a mixer."""
    count = mixer.prefix + mixer.grid[0] * mixer.grid[1]
    return torch.randn(BATCH, count, mixer.dim, dtype=torch.float64)


def error(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / (1 + max |b|), or infinity if anything is not finite, so that no comparison accepts it."""
    largest = (a - b).abs().max() / (1 + b.abs().max())
    return float(largest) if largest.isfinite() else math.inf


def twin(mixer: Mixer, spec: MixerSpec | str, **changed: Tensor) -> Mixer:
    """Return a mixer of another spec with the tensors of `mixer` where the names agree, and `changed` (dots as __)."""
    other = random_mixer(spec, mixer.grid, mixer.prefix, mixer.dim, mixer.num_heads)
    own, others = mixer.tensors(), {name.replace("__", "."): value for name, value in changed.items()}
    with torch.no_grad():
        for name, tensor in other.tensors().items():
            tensor.copy_(others[name] if name in others else own[name])
    return other


def set_tensors(mixer: Mixer, **values: Tensor | float) -> Mixer:
    """Fill tensors (dots as __) of the mixer in place and return it."""
    with torch.no_grad():
        for name, value in values.items():
            mixer.tensors()[name.replace("__", ".")].copy_(torch.as_tensor(value, dtype=torch.float64))
    return mixer


def _qkv(mixer: Mixer, x: Tensor) -> list[Tensor]:
    """q, k, v as (B, h, T, d) of a dynamic spec in frame linear, v only if the spec has one."""
    p = mixer.tensors()
    names = [name for name in ("q", "key", "value") if f"{name}.weight" in p]
    features = [F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"]) for name in names]
    return [f.unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in features]


def _out(mixer: Mixer, o_BhTd: Tensor) -> Tensor:
    p = mixer.tensors()
    return F.linear(o_BhTd.transpose(1, 2).flatten(2), p["out.weight"], p["out.bias"])


def _position(mixer: Mixer) -> Tensor:
    """p (h, T, T) as the operator expands it, zero where invisible."""
    p = relative(mixer.tensors(), Context(mixer.spec, mixer.dim, mixer.num_heads, mixer.geometry))
    assert p is not None
    visible = mixer.geometry.visible
    return p if visible is None else torch.where(visible, p, 0)


# ---- attention -------------------------------------------------------------------------------------------


def _two_convolutions() -> float:
    worst = 0.0
    for pipeline in PIPELINES:
        for base in ("vit_relpos", "swin support=window(3, shift=1)", "vit_relpos size=3", "linformer", "strided_bank"):
            mixer = random_mixer(MixerSpec.parse(f"{base} activation={pipeline}"), prefix=1)
            x = tokens(mixer)
            with use_path("conv"):
                convolutions = mixer(x)
            worst = max(worst, error(convolutions, mixer(x)))
    return worst


def _identity_attention() -> float:
    mixer = random_mixer("vit activation=identity")
    x = tokens(mixer)
    q, k, v = _qkv(mixer, x)
    return error(mixer(x), _out(mixer, q @ (k.mT @ v) / (DIM // HEADS) ** 0.5))


def _layernorm_attention() -> float:
    """mean_j s and mean_j s^2 are computed through mean_j k, k^T k and p k, without an N x N product of q and k."""
    mixer = random_mixer("vit_relpos activation=layernorm")
    x = tokens(mixer)
    (q, k, v), p = _qkv(mixer, x), _position(mixer)
    q, N = q / (DIM // HEADS) ** 0.5, x.shape[1]
    mean = (q * k.mean(2, keepdim=True)).sum(-1) + p.mean(-1)
    square = ((q @ (k.mT @ k)) * q).sum(-1) / N + 2 * (q * (p @ k)).sum(-1) / N + (p**2).mean(-1)
    sigma = (square - mean**2 + 1e-6).sqrt()
    o = (q @ (k.mT @ v) + p @ v - mean[..., None] * v.sum(2, keepdim=True)) / sigma[..., None]
    return error(mixer(x), _out(mixer, o))


def _rotary_offsets() -> float:
    """Moving every position by the same rows and columns changes no score."""
    worst = 0.0
    for layout in ("interleaved", "half"):
        mixer = random_mixer(f"vit_rope position=rope(50, {layout})", dim=16)
        moved = twin(mixer, f"vit_rope position=rope(50, {layout}, origin=3)")
        worst = max(worst, error(mixer(x := tokens(mixer)), moved(x)))
    return worst


def _rotary_products() -> float:
    """Write the pairs of channels as complex numbers, times exp(i angle)."""
    mixer = random_mixer("vit_rope position=rope(50)", dim=16, prefix=1)
    x, (H, W) = tokens(mixer), mixer.grid
    q, k, v = _qkv(mixer, x)
    frequencies = 50.0 ** -torch.arange(0, 1, 0.5, dtype=torch.float64)
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in (H, W)), indexing="ij")
    angles = torch.cat([at.flatten()[:, None] * frequencies for at in (rows, columns)], 1)
    turns = torch.polar(torch.ones_like(angles), angles)
    turns = torch.cat([torch.ones_like(turns[:1]), turns])
    q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turns for t in (q, k))
    scores = (q @ k.mH).real / (16 // HEADS) ** 0.5
    return error(mixer(x), _out(mixer, scores.softmax(-1) @ v))


def _window_is_grid() -> float:
    swin = random_mixer("swin support=window(5)", (5, 5), prefix=1)
    return error(swin(x := tokens(swin)), twin(swin, "vit_relpos")(x))


def _regions_alone(support: str) -> float:
    """Run every region of a support through the same spec, on a grid of that region alone."""
    worst = 0.0
    for text in ("swin", "swin activation=relu,count", "swin activation=layernorm,count", "dwsa_window"):
        spec = MixerSpec.parse(f"{text} support={support}")
        mixer = random_mixer(spec, (7, 5))
        x = tokens(mixer)
        y, alone = mixer(x).unflatten(1, mixer.grid), x.unflatten(1, mixer.grid)
        rows, columns = (sorted(set(seen(spec.support, side))) for side in mixer.grid)
        for r in rows:
            for c in columns:
                block = alone[:, r][:, :, c]
                grid = (block.shape[1], block.shape[2])
                inner = random_mixer(MixerSpec.parse(f"{text} support=all"), grid)
                table = mixer.tensors()["table.weight"]
                middle = [(side - 1) // 2 for side in table.shape[1:]]
                cut = table[
                    :, middle[0] - grid[0] + 1 : middle[0] + grid[0], middle[1] - grid[1] + 1 : middle[1] + grid[1]
                ]
                shared = {n: t for n, t in mixer.tensors().items() if n != "table.weight"}
                set_tensors(inner, **shared, table__weight=cut)
                worst = max(worst, error(y[:, r][:, :, c].flatten(1, 2), inner(block.flatten(1, 2))))
    return worst


def _linformer_identity() -> float:
    linformer = random_mixer("linformer mix=project(20)")
    set_tensors(linformer, E=torch.eye(20), F=torch.eye(20))
    return error(linformer(x := tokens(linformer)), twin(linformer, "vit")(x))


def _external_rows() -> float:
    """Write out the softmax over positions and the l1 over kernels."""
    mixer = random_mixer("external_attention", dim=DIM)
    x, p = tokens(mixer), mixer.tensors()
    a = torch.softmax(F.linear(F.linear(x, p["q.weight"], p["q.bias"]), p["key.weight"]), 1)
    o = (a / a.sum(-1, keepdim=True)) @ p["value.weight"].t()
    return error(mixer(x), F.linear(o, p["out.weight"], p["out.bias"]))


# ---- depth-wise self-attention ---------------------------------------------------------------------------


def _position_is_convolution() -> float:
    """Offsets are i - j and conv2d correlates, so both axes are flipped; the weights are shared within a head."""
    mixer = random_mixer("dwsa")
    x, p, (H, W) = tokens(mixer), mixer.tensors(), mixer.grid
    q, k = _qkv(mixer, x)
    table = p["table.weight"].flip(1, 2).repeat_interleave(DIM // HEADS, 0)[:, None]
    k_map = k.transpose(2, 3).flatten(1, 2).unflatten(2, (H, W))
    pk = F.conv2d(k_map, table, padding=(H - 1, W - 1), groups=DIM).flatten(2).unflatten(1, (HEADS, -1)).mT
    return error(mixer(x), _out(mixer, q * k.mean(2, keepdim=True) + pk))


def _mean_is_pool() -> float:
    worst = 0.0
    for support in SUPPORTS:
        for size in (1, 3):
            mixer = random_mixer(f"dwsa position=none support={support} size={size}", prefix=1)
            x = tokens(mixer)
            worst = max(worst, error(mixer(x), twin(mixer, mixer.spec.override(mix="pool"))(x)))
    return worst


def _gate() -> float:
    mixer = random_mixer("dwsa position=none")
    x = tokens(mixer)
    q, k = _qkv(mixer, x)
    return error(mixer(x), _out(mixer, q * k.mean(2, keepdim=True)))


def _gate_permutes() -> float:
    mixer = random_mixer("dwsa position=none")
    x = tokens(mixer)
    order = torch.randperm(x.shape[1])
    return error(mixer(x[:, order]), mixer(x)[:, order])


# ---- dynamic convolutions --------------------------------------------------------------------------------


def _equal_experts() -> float:
    dconv = random_mixer("dconv", prefix=1)
    p = dconv.tensors()
    set_tensors(dconv, weight=p["weight"][:1].expand(4, -1, -1, -1, -1), bias=p["bias"][:1].expand(4, -1))
    conv = twin(dconv, "conv", weight=p["weight"][:1], bias=p["bias"][:1])
    return error(dconv(x := tokens(dconv)), conv(x))


def _infinite_temperature() -> float:
    dconv = random_mixer("dconv mix=predict(softmax, tau=1e15, r=4)")
    p = dconv.tensors()
    conv = twin(dconv, "conv", weight=p["weight"].mean(0, keepdim=True), bias=p["bias"].mean(0, keepdim=True))
    return error(dconv(x := tokens(dconv)), conv(x))


def _one_hot_expert() -> float:
    """sigmoid(+-1e3) is 1 or 0 in float64, so the routing selects expert 3 alone."""
    worst = 0.0
    for row, static in (("condconv", "conv"), ("condconv_dw", "dwconv size=3")):
        routed = random_mixer(row)
        hot = torch.full((8,), -1e3).index_fill(0, torch.tensor(3), 1e3)
        set_tensors(routed, predict__weight=torch.zeros(8, DIM), predict__bias=hot)
        p = routed.tensors()
        expert = twin(routed, static, weight=p["weight"][3:4], bias=p["bias"][3:4])
        worst = max(worst, error(routed(x := tokens(routed)), expert(x)))
    return worst


def _constant_generator() -> float:
    """A generator with zero weights emits its bias everywhere, which is a static depth-wise convolution: per image
    (ddwconv), or per position with weights shared in groups (iddwconv)."""
    worst = 0.0
    for row, static in (("ddwconv", "dwnet"), ("iddwconv kernel=grouped(4)", "dwnet kernel=grouped(4)")):
        dynamic = random_mixer(row, prefix=1)
        taps = dynamic.tensors()["key.bias"]
        set_tensors(dynamic, key__weight=torch.zeros_like(dynamic.tensors()["key.weight"]))
        bias = dynamic.tensors().get("bias", torch.zeros(DIM, dtype=torch.float64))
        fixed = twin(dynamic, static, weight=taps.view(1, -1, 1, 7, 7), bias=bias[None])
        worst = max(worst, error(dynamic(x := tokens(dynamic)), fixed(x)))
    return worst


def _ffn() -> float:
    mixer = random_mixer("ffn", prefix=1)
    p = mixer.tensors()
    hidden = F.gelu(F.linear(x := tokens(mixer), p["key.weight"], p["key.bias"]))
    return error(mixer(x), F.linear(hidden, p["value.weight"], p["value.bias"]))


def _squeeze_excitation() -> float:
    mixer = random_mixer("se", dim=32)
    p = mixer.tensors()
    squeezed = F.relu(F.linear((x := tokens(mixer)).mean(1), p["reduce.weight"], p["reduce.bias"]))
    gate = torch.sigmoid(F.linear(squeezed, p["key.weight"], p["key.bias"]))
    return error(mixer(x), x * gate[:, None])


def _pooling() -> float:
    mixer = random_mixer("pool")
    x = tokens(mixer).mT.unflatten(2, mixer.grid)
    pooled = nn.AvgPool2d(3, 1, 1, count_include_pad=False)(x) - x
    return error(mixer(x.flatten(2).mT), pooled.flatten(2).mT)


# ---- every row -------------------------------------------------------------------------------------------


def _size_three_loops() -> float:
    worst = 0.0
    for row in ("vit3", "dwsa3", "swin3 support=window(3, shift=1)"):
        mixer = random_mixer(row, (3, 4), prefix=1)
        x = tokens(mixer)
        with use_path("reference"):
            loops = mixer(x)
        worst = max(worst, error(mixer(x), loops))
    return worst


def _rows_are_the_definition() -> float:
    worst = 0.0
    for row in ROWS:
        spec = MixerSpec.parse(row).at_block(1)
        mixer = random_mixer(spec, (2, 3), prefix=1, dim=32)
        x = tokens(mixer)
        with use_path("reference"):
            defined = mixer(x)
        worst = max(worst, error(mixer(x), defined))
    return worst


def _invisible_tokens() -> float:
    """Outputs that do not see a perturbed grid token stay bit-identical."""
    worst = 0.0
    for text in ("swin", "swin activation=relu,count", "swin activation=layernorm,count", "swin activation=batchnorm",
                 "dwsa_window", "maxvit_grid support=grid(2)", "nat support=neighborhood(3)",
                 "involution size=1"):  # fmt: skip
        support = {"support": "window(3, shift=1)"} if "window" in str(MixerSpec.parse(text).support) else {}
        mixer = random_mixer(MixerSpec.parse(text).override(**support), (5, 5), prefix=1, dim=16)
        x = tokens(mixer)
        before, moved = mixer(x), x.clone()
        moved[:, 9] += 1e3
        blind = ~visibility(mixer.spec.support, mixer.grid, mixer.prefix)[:, 9]
        worst = max(worst, error(mixer(moved)[:, blind], before[:, blind]))
    return worst


PROOFS: dict[str, Identity] = {
    "attention is two convolutions": Identity(
        "matrix products = two grouped 1x1 dynamic conv2d, every pipeline (paper, section 4.2)", _two_convolutions),
    "identity fuses the kernels": Identity(
        "activation identity = q (k^T v) / sqrt(d) (paper, section 5.3)", _identity_attention),
    "LayerNorm is linear in N": Identity(
        "activation layernorm = a form through k^T k, k^T v, p k and p v", _layernorm_attention),
    "rotations see offsets": Identity("rope without prefix: the same from any origin", _rotary_offsets),
    "rotations are products": Identity(
        "rope = pairs of channels as complex numbers times exp(i angle), the prefix alone", _rotary_products),
    "window as large as the grid": Identity("swin with M = H = W, shift 0 = vit_relpos", _window_is_grid),
    "shifted window": Identity("a shifted window = each region alone on its own grid",
                               lambda: _regions_alone("window(3, shift=1)")),
    "dilated grid": Identity("a dilated grid = each set of positions that see each other alone on its own grid",
                             lambda: _regions_alone("grid(3)")),
    "projection by identity": Identity("linformer with E = F = I = vit", _linformer_identity),
    "external attention": Identity(
        "external_attention = softmax over positions, then l1 over the bank", _external_rows),
    "position is a convolution": Identity(
        "dwsa = q * mean(k) + zero-padded conv2d of k by the flipped table of each head", _position_is_convolution),
    "mean is pool": Identity(
        "linear generators: averaging kernels = generating from the average, every support and size", _mean_is_pool),
    "gate": Identity("dwsa without position = a gate per channel and image", _gate),
    "gate is equivariant": Identity("dwsa without position commutes with permutations of positions", _gate_permutes),
    "equal experts": Identity("dconv with K equal kernels = a static convolution", _equal_experts),
    "infinite temperature": Identity("dconv with tau -> infinity = the mean kernel", _infinite_temperature),
    "one-hot routing": Identity("condconv with one-hot routing = expert k", _one_hot_expert),
    "constant generator": Identity(
        "ddwconv, iddwconv with a constant generator = static depth-wise convolution", _constant_generator),
    "ffn": Identity("the ffn row = the usual MLP", _ffn),
    "squeeze-and-excitation": Identity("the se row = x * sigmoid(W2 relu(W1 mean(x)))", _squeeze_excitation),
    "pooling": Identity("the pool row = average pooling minus the input", _pooling),
    "size 3": Identity("vit3, dwsa3, swin3 = loops over taps", _size_three_loops),
    "every row": Identity("every row of the atlas = the literal definition", _rows_are_the_definition),
    "invisible tokens": Identity(
        "a perturbed invisible token leaves the output bit-identical", _invisible_tokens, tolerance=0.0),
}  # fmt: skip
