"""Run ``kernelbank benchmark``: measure or explain, print a table, and write the results as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.benchmark.measure import Growth, Measurement, growths, measure
from kernelbank.benchmark.subjects import Site, Subject, check, read
from kernelbank.errors import UsageError
from kernelbank.files import replace_text
from kernelbank.ops.context import Call, Context
from kernelbank.ops.geometry import geometry
from kernelbank.ops.machine import machine
from kernelbank.ops.plan import plan, verdicts
from kernelbank.records import CodeIdentity, MachineIdentity
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import check_host

RECORD_VERSION = 1


def run(options: Any) -> int:
    """Measure the subjects or explain the plan, and return the exit code. `options` are those of the verb. Raises
    InputError and SpecError."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return _explain(options) if options.explain else _measure(options)


# ---- explain ---------------------------------------------------------------------------------------------


def _explain(options: Any) -> int:
    if len(options.subject) != 1:
        raise UsageError("benchmark", "--explain takes one spec")
    spec = MixerSpec.parse(options.subject[0]).at_block(1)
    profile, plans = machine(dtype=_dtype(options)), list[dict[str, Any]]()
    for side in options.grid:
        for batch in options.batch:
            check_host(options.dim, options.heads, (side, side), 0)
            s = Context(spec, options.dim, options.heads, geometry(spec, (side, side), 0), options.train)
            call = Call(batch * side * side, dtype=_dtype(options), grad=options.train,
                        autocast=options.train and options.bf16)  # fmt: skip
            verdicts_of_paths = [asdict(v) for v in verdicts(s, call, profile)]
            plans.append({"spec": str(spec), "grid": side, "batch": batch, "plan": str(plan(s, call, profile)),
                          "verdicts": verdicts_of_paths})  # fmt: skip
    if options.json:
        print(json.dumps({"machine": profile.describe(), "plans": plans}, indent=2))
        return 0
    console = _console()
    console.print(profile.describe(), soft_wrap=True)
    for one in plans:
        title = f"{one['spec']} on {one['grid']} x {one['grid']}, batch {one['batch']}"
        table = Table("part", "path", "verdict", "reason", title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for v in one["verdicts"]:
            style = {"chosen": "bold green", "unsupported": "dim"}.get(v["verdict"], "")
            table.add_row(v["slot"], v["path"], v["verdict"], v["reason"], style=style)
        console.print(table)
    return 0


def _dtype(options: Any) -> torch.dtype:
    return torch.bfloat16 if options.bf16 and not options.train else torch.float32


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


# ---- measure ---------------------------------------------------------------------------------------------


def _measure(options: Any) -> int:
    subjects = [read(text) for text in options.subject]
    if len({subject.is_mixer for subject in subjects}) > 1:
        raise UsageError("benchmark", "models and single mixers are not comparable; expected subjects of one kind")
    sites = _sites(options, subjects)
    for subject in subjects:
        check(subject, sites[0])
    code = CodeIdentity.here()  # before the measurement, since files may change while it runs
    rows, ceiling = measure(subjects, sites, options.rounds, options.memory, _print_progress)
    growth = growths(rows)
    record = _record(options, code, rows, growth, ceiling)
    if options.out is not None:
        replace_text(options.out, json.dumps(record, indent=2) + "\n")
    if options.figure is not None:
        import_module("kernelbank.benchmark.figure").draw(rows, _title(options), options.figure)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        _show(rows, growth, ceiling, options)
    return 0


def _sites(options: Any, subjects: list[Subject]) -> list[Site]:
    """The sites to measure: every batch size at every side."""
    models = not subjects[0].is_mixer
    if not models:
        check_host(options.dim, options.heads, (options.grid[0], options.grid[0]), 0)
    return [
        Site(batch, side, options.dim, options.heads, options.train, options.bf16)
        for batch in options.batch
        for side in (options.img_size if models else options.grid)
    ]


def _print_progress(line: str) -> None:
    print(line, file=sys.stderr)


def _title(options: Any) -> str:
    what = "training step" if options.train else "inference"
    return f"{what}, {'bfloat16' if options.bf16 else 'float32'}, {torch.get_num_threads()} CPU threads"


OUTPUT = ("out", "figure", "json")
"""The options that say where results go, which are no part of a record."""


def _record(
    options: Any, code: CodeIdentity, rows: list[Measurement], growth: list[Growth], ceiling: float
) -> dict[str, Any]:
    chosen = {name: value for name, value in asdict(options).items() if name not in OUTPUT}
    return {
        "record_version": RECORD_VERSION,
        "code": asdict(code),
        "machine": asdict(MachineIdentity.here(torch.get_num_threads())),
        "probe": machine(dtype=_dtype(options)).describe(),
        "options": chosen,
        "ceiling_macs_per_second": ceiling,
        "rows": [asdict(row) for row in rows],
        "growth": [asdict(fit) for fit in growth],
    }


def _show(rows: list[Measurement], growth: list[Growth], ceiling: float, options: Any) -> None:
    console = _console()
    console.print(_title(options) + f"; {machine(dtype=_dtype(options)).describe()}", soft_wrap=True)
    console.print(f"fastest linear layer: {2 * ceiling / 1e9:.0f} GFLOP/s; ratio: speed relative to the first subject; "
                  "medians and quartiles over rounds", soft_wrap=True)  # fmt: skip
    heads = ["subject", "batch", "side", "ms", "quartiles", "ratio", "quartiles", "images/s", "GMAC", "of ceiling"]
    table = Table(*heads, *(["peak MiB"] if options.memory else []), "verdict", box=box.SIMPLE_HEAD)
    for row in rows:
        s, r = row.seconds, row.ratio
        peak = ["-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"] if options.memory else []
        table.add_row(row.subject, str(row.site.batch), str(row.site.side), f"{s.median * 1e3:.2f}",
                      f"{s.low * 1e3:.2f}-{s.high * 1e3:.2f}", f"{r.median:.2f}", f"{r.low:.2f}-{r.high:.2f}",
                      f"{row.images_per_second:.1f}", "-" if row.macs is None else f"{row.macs / 1e9:.2f}",
                      "-" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.2f}",
                      *peak, row.verdict)  # fmt: skip
    console.print(table)
    for fit in growth:
        sides = ", ".join(map(str, fit.sides))
        console.print(f"{fit.subject}: seconds ~ positions^{fit.exponent:.2f} over sides {sides}", soft_wrap=True)
