"""``kernelbank atlas``: the paper's table, the registered models, one spec in full, its figure, and the proofs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro

from kernelbank.commands.options import read_options
from kernelbank.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the paper's table with every known mixer, the registered models, or one spec in full: its cells, equation,
    diagram, parameters and cost."""

    spec: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")] = ()
    """A row of the table and the cells to change, such as: vit kernel=depthwise mix=mean"""
    dim: int = 384
    """Channels C of the mixer."""
    heads: int = 6
    """Heads h of the mixer."""
    grid: Annotated[tuple[int, int], tyro.conf.arg(metavar="H W")] = (14, 14)
    """Height and width of the grid."""
    prefix: int = 0
    """Tokens before the grid: class token and registers."""
    figure: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw the spec to FILE: .svg, .png or .pdf."""
    json: bool = False
    """Print JSON."""
    models: bool = False
    """Print the registered models: parameters, cost per image, and the figures that their sources publish."""
    prove: bool = False
    """Check the identities behind the table. The exit code is 1 if one fails."""
    coverage: bool = False
    """Count the pretrained models of timm whose token mixers a spec describes, by class. It takes about two minutes."""


HOST = ("dim", "heads", "grid", "prefix")
"""The options of one spec."""


def main(argv: list[str]) -> int:
    """Run the verb and return the exit code. Raises: SpecError, InputError: If the input cannot be used."""
    options = read(argv)
    host = {name: getattr(options, name) for name in HOST}
    if options.prove:
        return _call("prove:show_proofs", options.json)
    if options.coverage:
        return _call("coverage:show_coverage", options.json)
    if options.models:
        return _call("show:show_models", options.json)
    if options.spec:
        return _call("show:show_spec", " ".join(options.spec), **host, figure=options.figure, as_json=options.json)
    return _call("show:show_table", options.json)


def read(argv: list[str]) -> Options:
    """The options that `argv` states. Raises UsageError for words and values that cannot be used."""
    options = read_options(Options, "atlas", argv)
    _check(options)
    return options


def _call(target: str, *arguments: object, **named: object) -> int:
    """Import ``module:function`` of `analysis` and call it. Proofs import torch, which the others do without."""
    module, _, function = target.partition(":")
    code: int = getattr(import_module(f"kernelbank.analysis.{module}"), function)(*arguments, **named)
    return code


def _check(options: Options) -> None:
    """Raises: UsageError: If options do not go together."""
    if options.prove and options.spec:
        raise UsageError("atlas", "--prove checks the identities of the whole table; expected no spec")
    if options.models and (options.spec or options.prove):
        raise UsageError("atlas", "--models prints the registered models; expected no spec and no --prove")
    if options.coverage and (options.spec or options.prove or options.models):
        raise UsageError("atlas", "--coverage counts models of timm; expected no spec, --prove or --models")
    if not options.spec:
        if options.figure is not None:
            raise UsageError("atlas", "--figure draws one spec; expected a spec, such as: atlas vit --figure vit.svg")
        default = Options()
        if changed := [name for name in HOST if getattr(options, name) != getattr(default, name)]:
            raise UsageError("atlas", f"--{changed[0]} belongs to one spec; expected a spec, such as: atlas vit")
