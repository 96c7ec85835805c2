"""Write the sections of a report to one HTML file that needs no network: style, script and Plotly are included. Imports
no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kernelbank.records import CodeIdentity
from kernelbank.report.page import tables, verdicts
from kernelbank.report.plots import plots
from kernelbank.report.sections import Section, plural, report_notes
from kernelbank.report.summary import SummaryRow
from kernelbank.studies.catalogue import STUDIES
from kernelbank.studies.trained_run import SetAside, TrainedRun
from kernelbank.text import printable

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class RecordLinks:
    """Links to run records: the folder of the records, and the folder of the page."""

    folder: Path
    page_folder: Path

    def href(self, file: str) -> str:
        """The link from the page to a record."""
        return quote(Path(os.path.relpath(self.folder / file, self.page_folder)).as_posix())

    def sha256(self, file: str) -> str:
        """Return the SHA-256 of the file of a record. Raises OSError."""
        return hashlib.sha256((self.folder / file).read_bytes()).hexdigest()


def render(found: Sequence[Section], aside: Sequence[SetAside], links: RecordLinks) -> str:
    """Return the page. Raises OSError if a record can no longer be read."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, finalize=_shown, trim_blocks=True)
    code, runs = CodeIdentity.here(), [run for section in found for run in section.runs]
    anchors = {run.file: f"run-{index}" for index, run in enumerate(runs)}
    name = links.folder.resolve().name
    return environment.get_template("report.html.j2").render(
        title=f"Report of {name}", summary=_summary(runs), version=code.version, sources=code.sources[:16],
        notes=report_notes(found, aside), rules=verdicts.RULES, best_rule=verdicts.BEST_RATE, columns=tables.COLUMNS,
        run_columns=tables.RUN_COLUMNS,
        sections=[_section(section, f"s{index}", anchors, links) for index, section in enumerate(found)],
        css=_asset("report.css"), script=_asset("report.js"), plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """Return text from files with characters that are not printable escaped. Markup of this package is unchanged."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _asset(name: str) -> Markup:
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def _summary(runs: Sequence[TrainedRun]) -> str:
    studies, data = dict.fromkeys(run.study for run in runs), dict.fromkeys(run.data.name for run in runs)
    finished, named = sum(run.finished for run in runs), f"studies {', '.join(studies)}; data {', '.join(data)}"
    return f"{plural(len(runs), 'run')}, {finished} of them with all epochs; {named}."


def _section(section: Section, where: str, anchors: Mapping[str, str], links: RecordLinks) -> dict[str, Any]:
    best = None if section.best is None else verdicts.verdict_views(section.best, f"{where}-b", anchors.__getitem__)
    return {
        "anchor": where, "title": section.title, "size": plural(len(section.runs), "run"), "notes": section.notes,
        "caveat": section.caveat, "shared": verdicts.verdict_views(section.shared, f"{where}-a", anchors.__getitem__),
        "best": best, "missing": verdicts.missing_lines(section.shared),
        "groups": [_group(rows, f"{where}-g{index}", anchors, links) for index, rows in enumerate(section.groups)],
        "facts": list(tables.facts(section.runs)),
    }  # fmt: skip


def _group(rows: Sequence[SummaryRow], where: str, anchors: Mapping[str, str], links: RecordLinks) -> dict[str, Any]:
    first, compared = rows[0], any(row.is_baseline for row in rows)
    return {
        "anchor": where,
        "title": f"{first.study}, {first.model}",
        "subtitle": STUDIES[first.study]().title if first.study in STUDIES else "",
        "rows": [{"cells": tables.row_cells(row, compared), "anchor": f"{where}-r{index}"}
                 for index, row in enumerate(rows)],
        "plots": [{"anchor": f"{where}-{plot.name}", "caption": plot.caption, "figure": Markup(plot.figure)}
                  for plot in plots(rows)],
        "runs": [
            {"anchor": anchors[run.file], "first": "" if place else f"{where}-r{index}", "file": run.file,
             "href": links.href(run.file), "cells": tables.run_cells(run, links.sha256(run.file))}
            for index, row in enumerate(rows) for place, run in enumerate(row.runs)
        ],
    }  # fmt: skip
