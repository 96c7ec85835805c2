"""Measure the speed goals: ``python benchmarks/goals.py ROW``. Without a ROW the rows are listed; ``all`` runs them.

The rows are measured with the code of `kernelbank benchmark`: candidates take turns in one process, the ratio is taken
per round, and there is no verdict if its quartiles are too far apart. Runs on the CPU with torch's default number of
threads. Options: ``--rounds N`` and ``--out FOLDER``, which writes one JSON file per row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from kernelbank.benchmark.subjects import Runner, Site, read
from kernelbank.benchmark.timing import Distribution, exponent, interleave, peak_memory, ratios, verdict
from kernelbank.files import replace_text
from kernelbank.ops.bank import TwoStepBank
from kernelbank.ops.context import Call, Context
from kernelbank.ops.geometry import geometry
from kernelbank.ops.machine import machine
from kernelbank.ops.paths import LINEAR_PATHS, POSITION_PATHS, associated, pointwise
from kernelbank.ops.plan import plan
from kernelbank.ops.position import matrix, spread
from kernelbank.records import CodeIdentity, MachineIdentity
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import inventory

DEIT, SWIN = "deit_small_patch16_224", "swin_tiny_patch4_window7_224"
OUR_DEIT, OUR_SWIN = "vit_kb_small_patch16_224", "swin_kb_tiny_patch4_window7_224"
WINDOWED = "dwsa_window"


@dataclass(frozen=True)
class Ratio:
    """The goal that `other` is at least `goal` times as fast as `base`."""

    base: str
    other: str
    goal: float
    site: Site = Site(8, 224)


LINEARS = 1.8
"""The gain in the probe from which the goals that depend on fast linear layers apply."""

MODELS: dict[str, tuple[Ratio, ...]] = {
    "same-model": (Ratio(DEIT, OUR_DEIT, 1.85), Ratio(DEIT, f"accelerate {DEIT}", 1.85), Ratio(SWIN, OUR_SWIN, 1.85)),
    "depthwise": (Ratio(DEIT, f"{OUR_DEIT} : dwsa", 2.35), Ratio(SWIN, f"{OUR_SWIN} : {WINDOWED}", 2.2)),
    "same-linears": (
        Ratio(f"accelerate {DEIT}", f"{OUR_DEIT} : dwsa", 1.15),
        Ratio(f"accelerate {SWIN}", f"{OUR_SWIN} : {WINDOWED}", 1.15),
        Ratio(DEIT, f"{OUR_DEIT} : dwsa @linear", 1.15),
        Ratio(SWIN, f"{OUR_SWIN} : {WINDOWED} @linear", 1.15),
    ),
    "relu": (Ratio(DEIT, f"{OUR_DEIT} : relu_attention", 2.1),
             Ratio(f"accelerate {DEIT}", f"{OUR_DEIT} : relu_attention", 1.05)),
    "train": (
        Ratio(DEIT, OUR_DEIT, 1.5, Site(16, 224, train=True)),
        Ratio(DEIT, f"{OUR_DEIT} : dwsa", 2.0, Site(16, 224, train=True)),
        Ratio(DEIT, f"{OUR_DEIT} : dwsa @linear", 1.2, Site(16, 224, train=True)),
    ),
    "bf16": (Ratio(DEIT, f"{OUR_DEIT} : dwsa", 1.3, Site(8, 224, half=True)),
             Ratio(DEIT, f"{OUR_DEIT} : relu_attention", 1.25, Site(8, 224, half=True))),
    "batch-1": tuple(Ratio(DEIT, name, 1.0, Site(1, 224))
                     for name in (OUR_DEIT, f"{OUR_DEIT} : relu_attention", f"{OUR_DEIT} : dwsa"))
    + tuple(Ratio(SWIN, name, 1.0, Site(1, 224)) for name in (OUR_SWIN, f"{OUR_SWIN} : {WINDOWED}")),
}  # fmt: skip


@dataclass(frozen=True)
class Core:
    """The operator without its linear layers: q, k and v per head, and the context that the plan is made for."""

    text: str
    side: int
    batch: int
    dim: int
    heads: int

    def sdpa(self) -> Callable[[], Tensor]:
        """torch's softmax attention of the same q, k and v, without a bias."""
        q, k, v = self._tensors()
        return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def sdpa_with_table(self) -> Callable[[], Tensor]:
        """The same with the relative position bias as an additive mask."""
        q, k, v = self._tensors()
        s, params = self._context()
        mask = matrix(params, s.geo)
        return lambda: F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)

    def products(self) -> Callable[[], Tensor]:
        """The two matrix products of attention with an N x N map and nothing between them, the map in a buffer that is
        reused: a bound for every form with these products."""
        q, k, v = (t.contiguous().flatten(0, 1) for t in self._tensors())
        heads = 2 if self.side > 14 else self.heads
        room, o = q.new_empty(heads, self.side**2, self.side**2), torch.empty_like(q)

        def run() -> Tensor:
            for at in range(0, len(q), heads):
                pairs = slice(at, at + heads)
                torch.bmm(q[pairs], k[pairs].mT, out=room)
                torch.bmm(room, v[pairs], out=o[pairs])
            return o

        return run

    def ours(self) -> Callable[[], Tensor]:
        """The operator of the spec."""
        q, k, v = self._tensors()
        s, params = self._context()
        if self.text.startswith("dwsa"):
            q, k = (t.transpose(1, 2).flatten(2) for t in (q, k))
            return lambda: torch.addcmul(spread(k, params, s), q, k.mean(1, keepdim=True))
        bank = TwoStepBank(k, v, (self.dim // self.heads) ** -0.5)
        attends = {"identity": associated.attend_affine, "layernorm": associated.attend_moments}
        attend = attends.get(self.text.partition("_")[0], pointwise.attend)
        return lambda: attend(q, bank, params, s).transpose(1, 2).flatten(2)

    def plan(self) -> str:
        """The plan, as text."""
        s, _ = self._context()
        return str(plan(s, Call(self.batch * self.side**2), machine()))

    def _context(self) -> tuple[Context, dict[str, Tensor]]:
        spec = MixerSpec.parse(self.text)
        params = {e.name: torch.randn(e.shape) for e in inventory(spec, self.dim, self.heads, (self.side, self.side))}
        bare = Context(spec, self.dim, self.heads, geometry(spec, (self.side, self.side), 0))
        chosen = plan(bare, Call(self.batch * self.side**2), machine())
        form = POSITION_PATHS[chosen.position.path if chosen.position else "dense"].run
        linear = LINEAR_PATHS[chosen.linear.path].run
        return Context(spec, self.dim, self.heads, bare.geo, linear=linear, position=form), params

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        shape = (self.batch, self.side**2, self.heads, self.dim // self.heads)
        q, k, v = (torch.randn(shape).transpose(1, 2) for _ in range(3))
        return q, k, v


def _depthwise(side: int, batch: int) -> Core:
    return Core("dwsa", side, batch, 96, 3)


def _wide(text: str, side: int, batch: int) -> Core:
    return Core(text, side, batch, 384, 6)


CORES: dict[str, tuple[tuple[Core, float], ...]] = {
    "operator-depthwise": ((_depthwise(14, 64), 2.5), (_depthwise(28, 16), 4.0), (_depthwise(64, 3), 9.0),
                           (_depthwise(128, 1), 18.0)),
    "operator-relu": ((_wide("relu_attention", 14, 16), 1.05), (_wide("relu_attention", 28, 4), 1.6),
                      (_wide("relu_attention", 56, 1), 1.8), (_wide("relu_attention position=relative", 14, 16), 1.05),
                      (_wide("relu_attention position=relative", 28, 4), 1.6),
                      (_wide("relu_attention position=relative", 56, 1), 1.8)),
    "operator-linear": ((_wide("layernorm_attention", 56, 1), 1.7), (_wide("identity_attention", 56, 1), 6.0)),
}  # fmt: skip

SIDES = (28, 40, 56, 80, 112, 128)
GROWING = ("dwsa", "identity_attention", "layernorm_attention")
GROWTH = 1.35
"""The goal for the exponent of GROWING: at most this."""
ROWS = (*MODELS, *CORES, "growth")


def run_models(row: str, rounds: int) -> list[dict[str, object]]:
    """Measure the ratios of one row. Subjects at the same site take turns."""
    found = []
    for site in dict.fromkeys(ratio.site for ratio in MODELS[row]):
        wanted = [ratio for ratio in MODELS[row] if ratio.site == site]
        names = dict.fromkeys(name for ratio in wanted for name in (ratio.base, ratio.other))
        taken = interleave({name: Runner(read(name), site).step for name in names}, rounds)
        for ratio in wanted:
            found.append(_result(ratio.base, ratio.other, ratio.goal, taken[ratio.base], taken[ratio.other]))
    return found


def run_cores(row: str, rounds: int) -> list[dict[str, object]]:
    """Measure the operators of one row against SDPA."""
    found = []
    for core, goal in CORES[row]:
        candidates = {"SDPA": core.sdpa(), "ours": core.ours()}
        if row == "operator-relu":
            candidates["its two products alone"] = core.products()
        if "position=relative" in core.text:
            candidates["SDPA with the table"] = core.sdpa_with_table()
        with torch.no_grad():
            taken = interleave(candidates, rounds)
        name = f"{core.text} {core.side}x{core.side} batch {core.batch}"
        print(f"     {name}: {core.plan()}")
        found.append(_result("SDPA", name, goal, taken["SDPA"], taken["ours"]))
        for other in [name for name in taken if name not in ("SDPA", "ours")]:
            found.append(_result(other, name, None, taken[other], taken["ours"]))
    return found


def run_growth(rounds: int) -> list[dict[str, object]]:
    """Measure the exponent in N, and the peak memory for each N, at batch 1 and 96 channels in 3 heads."""
    found: list[dict[str, object]] = []
    for text in (*GROWING, "sdpa"):
        seconds, peaks = [], []
        for side in SIDES:
            core = Core("dwsa" if text == "sdpa" else text, side, 1, 96, 3)
            run = core.sdpa() if text == "sdpa" else core.ours()
            with torch.no_grad():
                seconds.append(median(interleave({text: run}, rounds)[text]))
                peaks.append(peak_memory(run))
        power = exponent([side**2 for side in SIDES], seconds)
        memory = [None if peak is None else round(peak / 2**20, 1) for peak in peaks]
        outcome = "    " if text == "sdpa" else "met " if power <= GROWTH else "MISS"
        print(f"{outcome} {text}: N^{power:.2f} (goal <= {GROWTH}), ms "
              f"{[round(value * 1e3, 2) for value in seconds]}, peak MiB {memory}")  # fmt: skip
        found.append({"subject": text, "exponent": power, "sides": SIDES, "seconds": seconds, "peak_mib": memory})
    return found


def _result(base: str, other: str, goal: float | None, slow: list[float], fast: list[float]) -> dict[str, object]:
    ratio = ratios(slow, fast)
    met = "    " if goal is None else "met " if ratio.median >= goal else "MISS"
    text = verdict(ratio)
    quiet = "" if not text.startswith("none") else f"  [{text}]"
    wanted = "" if goal is None else f" goal {goal}"
    print(f"{met} {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{wanted}: {other}  against  {base}"
          f"  ({median(slow) * 1e3:.1f} / {median(fast) * 1e3:.1f} ms){quiet}", flush=True)  # fmt: skip
    return {"base": base, "other": other, "goal": goal, "ratio": asdict(ratio), "verdict": text,
            "seconds": {"base": asdict(Distribution.of(slow)), "other": asdict(Distribution.of(fast))}}  # fmt: skip


def main() -> int:
    """Measure the rows that are named and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, "all", []], help="what to measure")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.rows:
        print("rows:", ", ".join(ROWS))
        return 0
    print(machine().describe())
    binding = machine().gain("mkldnn", 1576) >= LINEARS
    outcome = "apply" if binding else f"do not apply, since their gain in the probe is below {LINEARS}"
    print(f"goals that depend on fast linear layers {outcome}")
    for row in ROWS if "all" in options.rows else options.rows:
        print(f"-- {row}")
        found = (
            run_growth(options.rounds) if row == "growth"
            else run_models(row, options.rounds) if row in MODELS
            else run_cores(row, options.rounds)
        )  # fmt: skip
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            record = {"row": row, "machine": asdict(MachineIdentity.here(torch.get_num_threads())),
                      "probe": machine().describe(), "code": asdict(CodeIdentity.here()), "found": found}  # fmt: skip
            replace_text(options.out / f"{row}.json", json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
