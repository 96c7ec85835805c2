"""``kernelbank benchmark``: models and records side by side, or the plan of a record and what every path says."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.benchmark.measure import Growth, Row, growths, measure
from kernelbank.benchmark.subjects import Site, Subject, check, read
from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError, require
from kernelbank.files import replace_text
from kernelbank.ops.context import Setting
from kernelbank.ops.geometry import geometry
from kernelbank.ops.machine import machine
from kernelbank.ops.path import Call
from kernelbank.ops.plan import plan, verdicts
from kernelbank.records import CodeIdentity, MachineIdentity
from kernelbank.spec import MixerSpec
from kernelbank.spec.inventory import check_host

RECORD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure models and records side by side, in turns in one process; or, with --explain, print the path that a
    record takes and what every path says of it."""

    subject: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = ()
    """Each one quoted: a timm model, "MODEL : RECORD", a RECORD as one mixer; "accelerate MODEL" for the fastest
    linears; "... @path,path" forces paths. The first is the base of the ratios."""
    batch: tuple[int, ...] = (8,)
    """Images; several are a sweep."""
    img_size: tuple[int, ...] = (224,)
    """Sides of the images of models; several are a sweep with the fitted exponent."""
    grid: tuple[int, ...] = (14,)
    """Sides of the square grid of records; several are a sweep with the fitted exponent."""
    dim: int = 384
    """Channels of records."""
    heads: int = 6
    """Heads of records."""
    train: bool = False
    """A training step: forward, loss, backward, AdamW."""
    bf16: bool = False
    """bfloat16: model and input in inference, autocast in training."""
    rounds: int = 11
    """How many times each subject is timed."""
    threads: int | None = None
    """Threads for torch; as many as it takes by itself unless given."""
    memory: bool = False
    """Measure the peak memory of one call too."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the record, JSON, to FILE."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw images a second against the side to FILE: .svg, .png or .pdf."""
    explain: bool = False
    """Print the plan of one record at --dim, --heads, --grid and --batch, and every path's verdict."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. Raises InputError and SpecError."""
    options = read_options(Options, "benchmark", argv)
    _check(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.explain:
        return _explain(options)
    return _measure(options)


def _check(options: Options) -> None:
    """Raises UsageError for what cannot be measured."""
    if not options.subject:
        raise UsageError("benchmark", "nothing to measure: name models or records, such as: benchmark vit dwsa")
    for name in ("batch", "img_size", "grid"):
        values = getattr(options, name)
        if not values or min(values) < 1:
            raise UsageError("benchmark", f"--{name.replace('_', '-')} {values} is not legal; legal: numbers >= 1")
    for name in ("rounds", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError("benchmark", f"--{name} {value} is not legal; legal: a number >= 1")
    if len(set(options.subject)) < len(options.subject):
        raise UsageError("benchmark", "a subject is named twice")
    for path, kinds in ((options.figure, (".svg", ".png", ".pdf")), (options.out, (".json",))):
        if path is not None and path.suffix not in kinds:
            raise UsageError("benchmark", f"cannot write {path}; legal: {', '.join(kinds)}")
        if path is not None and not path.parent.is_dir():
            raise UsageError("benchmark", f"cannot write {path}: there is no folder {path.parent}")


# ---- explain ---------------------------------------------------------------------------------------------


def _explain(options: Options) -> int:
    if len(options.subject) != 1:
        raise UsageError("benchmark", "--explain takes one record")
    spec = MixerSpec.parse(options.subject[0]).at_block(1)
    here, shown = machine(), list[dict[str, Any]]()
    for side in options.grid:
        for batch in options.batch:
            check_host(options.dim, options.heads, (side, side), 0)
            s = Setting(spec, options.dim, options.heads, geometry(spec, (side, side), 0), options.train)
            call = Call(batch * side * side, dtype=_dtype(options), grad=options.train,
                        autocast=options.train and options.bf16)  # fmt: skip
            said = [asdict(v) for v in verdicts(s, call, here)]
            shown.append({"record": str(spec), "grid": side, "batch": batch, "plan": str(plan(s, call, here)),
                          "verdicts": said})  # fmt: skip
    if options.json:
        print(json.dumps({"machine": here.describe(), "plans": shown}, indent=2))
        return 0
    console = _console()
    console.print(here.describe(), soft_wrap=True)
    for one in shown:
        title = f"{one['record']} on {one['grid']} x {one['grid']}, batch {one['batch']}"
        table = Table("part", "path", "verdict", "reason", title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for v in one["verdicts"]:
            style = {"chosen": "bold green", "refused": "dim"}.get(v["verdict"], "")
            table.add_row(v["slot"], v["path"], v["verdict"], v["reason"], style=style)
        console.print(table)
    return 0


def _dtype(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.bf16 and not options.train else torch.float32


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


# ---- measure ---------------------------------------------------------------------------------------------


def _measure(options: Options) -> int:
    subjects = [read(text) for text in options.subject]
    if len({subject.model is None for subject in subjects}) > 1:
        raise UsageError("benchmark", "models and records alone are not comparable: name one kind")
    if options.figure is not None:
        require("--figure", "report", "matplotlib")
    sites = _sites(options, subjects)
    for subject in subjects:
        check(subject, sites[0])
    rows, ceiling = measure(subjects, sites, options.rounds, options.memory, _say)
    found = growths(rows)
    record = _record(options, rows, found, ceiling)
    if options.out is not None:
        replace_text(options.out, json.dumps(record, indent=2) + "\n")
    if options.figure is not None:
        from kernelbank.report.resolution import draw  # noqa: PLC0415 - matplotlib takes half a second

        draw(rows, _title(options), options.figure)
    if options.json:
        print(json.dumps(record, indent=2))
    else:
        _show(rows, found, ceiling, options)
    return 0


def _sites(options: Options, subjects: list[Subject]) -> list[Site]:
    """The sweep: every batch at every side."""
    models = subjects[0].model is not None
    if not models:
        check_host(options.dim, options.heads, (options.grid[0], options.grid[0]), 0)
    return [
        Site(batch, side, options.dim, options.heads, options.train, options.bf16)
        for batch in options.batch
        for side in (options.img_size if models else options.grid)
    ]


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _title(options: Options) -> str:
    what = "training step" if options.train else "inference"
    return f"{what}, {'bfloat16' if options.bf16 else 'float32'}, {torch.get_num_threads()} CPU threads"


def _record(options: Options, rows: list[Row], found: list[Growth], ceiling: float) -> dict[str, Any]:
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {
        "record_version": RECORD_VERSION,
        "code": asdict(CodeIdentity.here()),
        "machine": asdict(MachineIdentity.here(torch.get_num_threads())),
        "probe": machine().describe(),
        "options": chosen,
        "ceiling_macs_per_second": ceiling,
        "rows": [asdict(row) for row in rows],
        "growth": [asdict(growth) for growth in found],
    }


def _show(rows: list[Row], found: list[Growth], ceiling: float, options: Options) -> None:
    console = _console()
    console.print(_title(options) + f"; {machine().describe()}", soft_wrap=True)
    console.print(f"fastest linear {2 * ceiling / 1e9:.0f} GFLOP/s; ratios against the first subject, medians and "
                  "quartiles over rounds", soft_wrap=True)  # fmt: skip
    heads = ["subject", "batch", "side", "ms", "quartiles", "ratio", "quartiles", "images/s", "GMAC", "of ceiling"]
    table = Table(*heads, *(["peak MiB"] if options.memory else []), "verdict", box=box.SIMPLE_HEAD)
    for row in rows:
        s, r = row.seconds, row.ratio
        peak = ["-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"] if options.memory else []
        table.add_row(row.subject, str(row.site.batch), str(row.site.side), f"{s.median * 1e3:.2f}",
                      f"{s.low * 1e3:.2f}-{s.high * 1e3:.2f}", f"{r.median:.2f}", f"{r.low:.2f}-{r.high:.2f}",
                      f"{row.images_per_second:.1f}", f"{row.macs / 1e9:.2f}", f"{row.ceiling_fraction:.2f}",
                      *peak, row.verdict)  # fmt: skip
    console.print(table)
    for growth in found:
        sides = ", ".join(map(str, growth.sides))
        console.print(f"{growth.subject}: seconds ~ positions^{growth.exponent:.2f} over sides {sides}", soft_wrap=True)
