"""The recipe that the options of ``train`` and ``study`` start from, found in the words of the command. Imports no
torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kernelbank.train.recipe import Recipe
from kernelbank.train.recipes import published, with_epochs


def option_value(argv: list[str], option: str) -> str | None:
    """Return the value of `option` in `argv`, or None if it is not given."""
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None


def starting_recipe(argv: list[str], name: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe `name` with `changes`, for the epochs that `argv` asks for: where it gives no warm-up, one that is
    longer than the epochs is scaled with them. Raises InputError for an unknown recipe."""
    recipe = published(name).recipe
    if changes:
        given = dict(changes)
        recipe = replace(with_epochs(recipe, given.pop("epochs", recipe.epochs)), **given)
    epochs = option_value(argv, "--epochs") or ""
    if option_value(argv, "--warmup-epochs") is None and epochs.isdecimal() and int(epochs) >= 1:
        return with_epochs(recipe, int(epochs))
    return recipe


def note_scaled_warmup(verb: str, argv: list[str], name: str, recipe: Recipe) -> None:
    """Print a line on stderr if `starting_recipe` scaled the warm-up."""
    before, first = published(name).recipe, os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    if first and recipe.epochs <= before.warmup_epochs and option_value(argv, "--warmup-epochs") is None:
        print(f"kernelbank {verb}: the warm-up takes {recipe.warmup_epochs} of {recipe.epochs} epochs, since the "
              f"{before.warmup_epochs} of recipe {name} do not fit; --warmup-epochs sets another number",
              file=sys.stderr)  # fmt: skip
