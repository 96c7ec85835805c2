"""``kernelbank report``: write the page of a folder of run records and print its verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from kernelbank.errors import InputError
from kernelbank.files import replace_text
from kernelbank.report.page.render import RecordLinks, render
from kernelbank.report.page.verdicts import effect_text, finding_lines, range_text
from kernelbank.report.report_document import document
from kernelbank.report.sections import Section, evaluated, report_notes, sections
from kernelbank.studies.trained_run import SetAside, read_folder
from kernelbank.studies.verdicts import ClaimVerdict
from kernelbank.text import printable

PAGE = "report.html"
COLUMNS = ("claim", "model", "compared", "measure", "effect", "95 % interval", "rule", "verdict")


def run(folder: Path, page: Path | None, as_json: bool) -> int:
    """Write the page and print the verdicts; return the exit code. Raises InputError."""
    page = page or folder / PAGE
    runs, aside = read_folder(folder)
    if not page.parent.is_dir():
        raise InputError(f"invalid --out={page}; expected a file in a folder that exists")
    found = sections(runs)
    replace_text(page, render(found, aside, RecordLinks(folder, page.parent)))
    if as_json:
        print(json.dumps(document(found, aside), indent=2, allow_nan=False))
    else:
        _show(found, aside, page)
    return 0


def _show(found: Sequence[Section], aside: Sequence[SetAside], page: Path) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    _print(console, report_notes(found, aside))
    for section in found:
        console.print(printable(section.title), style="bold", markup=False, soft_wrap=True)
        _print(console, section.notes)
        if not evaluated(section.shared):
            console.print("No claim can be evaluated on these runs.\n", markup=False)
            continue
        console.print(printable(section.caveat), markup=False)
        for title, verdicts in (("", section.shared), ("each row at its best learning rate", section.best)):
            if verdicts:
                table, remarks = _table(title, verdicts)
                console.print(table)
                for number, remark in enumerate(remarks, 1):
                    console.print(f"[{number}] {printable(remark)}", markup=False, soft_wrap=True)
                console.print()
    console.print(f"report in {printable(page)}", markup=False, soft_wrap=True)


def _print(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"- {printable(note)}", markup=False, soft_wrap=True)


def _table(title: str, verdicts: Sequence[ClaimVerdict]) -> tuple[Table, list[str]]:
    """Return a table with a line for each claim and its verdict, followed by a line for each comparison and model; and
    the remarks to which the numbers in brackets refer."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    remarks = list[str]()
    for name in COLUMNS:
        table.add_column(name, justify="right" if name == "effect" else "left")
    for verdict in evaluated(verdicts):
        table.add_row(verdict.claim.id, verdict.claim.name, "", "", "", "", "", verdict.decision, style="bold")
        for finding in verdict.findings:
            lines = list(finding_lines(finding))
            remarks += [line for line in lines if line not in remarks]
            marks = "".join(f" [{remarks.index(line) + 1}]" for line in lines)
            compared = finding.model, finding.contrast.label, finding.part.measure.name
            numbers = effect_text(finding), range_text(finding), finding.part.rule
            table.add_row("", *_plain(*compared, *numbers, finding.decision + marks))
    return table, remarks


def _plain(*texts: str) -> list[str]:
    """Return texts from files for a table: printable, and with rich's markup escaped."""
    return [printable(text).replace("[", "\\[") for text in texts]
