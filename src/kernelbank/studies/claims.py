"""The claims of the paper as data: the rows of a study that each compares, the measure and the test.

A claim has parts. A part is one contrast (a weighted sum of rows, formed for each seed), one measure and one test.
`verdicts` decides it in every model of the study. Nothing is computed here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

TestKind = Literal["superiority", "non-inferiority", "equivalence"]
TESTS: Mapping[TestKind, str] = MappingProxyType({
    "superiority": "holds if the effect is shown to be better than zero; does not hold if an effect as good as the "
                   "margin is ruled out",
    "non-inferiority": "holds if a loss as large as the margin is ruled out; does not hold if a larger loss is shown",
    "equivalence": "holds if effects as large as the margin are ruled out in both directions; does not hold if a "
                   "larger one is shown",
})  # fmt: skip
"""The tests, and the conditions under which they hold and do not hold. All other cases are undecided."""


@dataclass(frozen=True)
class Measure:
    """A measure of a run.

    Args:
        name: Its key in `verdicts.MEASURES`.
        label: Its name in reports.
        unit: The unit of differences.
        margin: The smallest difference that matters, in this unit.
        higher_is_better: Whether higher values are better.
        exact: Whether it is equal for all seeds, so that it needs no interval.
        images: The split of an accuracy, whose size limits its resolution; None for other measures.
        relative: Whether differences are in per cent of the baseline.
        step: A lower bound of the standard deviation over seeds, for measures with discrete values.
    """

    name: str
    label: str
    unit: str
    margin: float
    higher_is_better: bool = True
    exact: bool = False
    images: Literal["test", "val"] | None = None
    relative: bool = False
    step: float = 0.0


ACCURACY = Measure("test_top1", "test top-1 after the last epoch", "points", 1.0, images="test")
AREA = Measure("area", "mean validation top-1 over the epochs (area under the curve)", "points", 1.0, images="val")
EPOCHS = Measure("epochs_to_target", "epochs to the validation target, at most all (restricted mean)", "epochs", 1.0,
                 higher_is_better=False, images="val", step=0.5)  # fmt: skip
PARAMS = Measure("params", "parameters", "%", 1.0, higher_is_better=False, exact=True, relative=True)
MACS = Measure("macs", "multiply-adds of one image", "%", 1.0, higher_is_better=False, exact=True, relative=True)
TIME = Measure("seconds", "measured time of a training epoch (median)", "%", 1.0, higher_is_better=False, relative=True)


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of rows whose weights add up to zero. `label` describes the comparison."""

    label: str
    weights: Mapping[str, float]

    def in_windows(self) -> Contrast:
        """Return the contrast for a hierarchical trunk, with attention in windows (see `IN_WINDOWS`)."""
        named = {IN_WINDOWS.get(row, row): weight for row, weight in self.weights.items()}
        label = " ".join(IN_WINDOWS.get(word, word) for word in self.label.split())
        return Contrast(label, MappingProxyType(named))


IN_WINDOWS: Mapping[str, str] = MappingProxyType({
    "dwsa": "dwsa-window", "gate": "gate-window", "dwsa-untied": "dwsa-window-untied",
})  # fmt: skip
"""The paper selects from all kernels in ViT and from those of the window in Swin. The rows for a hierarchical trunk, by
the row for a plain one."""


def versus(row: str, baseline: str) -> Contrast:
    """`row` minus `baseline`."""
    return Contrast(f"{row} − {baseline}", MappingProxyType({row: 1.0, baseline: -1.0}))


def factor(label: str, pairs: tuple[tuple[str, str], ...]) -> Contrast:
    """Return the mean difference over pairs of rows (with the factor, without it)."""
    weights = dict[str, float]()
    for with_it, without in pairs:
        weights[with_it] = weights.get(with_it, 0.0) + 1 / len(pairs)
        weights[without] = weights.get(without, 0.0) - 1 / len(pairs)
    return Contrast(label, MappingProxyType(weights))


def interaction(row: str, baseline: str, given: str) -> Contrast:
    """Return (`row` − `baseline`) minus the same difference between the rows whose labels end in `given`."""
    weights = {row: 1.0, baseline: -1.0, f"{row}-{given}": -1.0, f"{baseline}-{given}": 1.0}
    return Contrast(f"({row} − {baseline}) − the same, {given}", MappingProxyType(weights))


@dataclass(frozen=True)
class ClaimPart:
    """One contrast by one measure and one test."""

    contrast: Contrast
    measure: Measure
    test: TestKind

    @property
    def rule(self) -> str:
        """The test in words, with its margin."""
        if self.measure.exact:
            return f"{'more' if self.measure.higher_is_better else 'fewer'} {self.measure.label}, counted exactly"
        return f"{self.test}, margin {self.margin_text}"

    @property
    def margin_text(self) -> str:
        """Return the margin with its unit, which is singular for a margin of one."""
        unit = self.measure.unit.removesuffix("s") if self.measure.margin == 1 else self.measure.unit
        return f"{self.measure.margin:g} {unit}"


@dataclass(frozen=True)
class Claim:
    """A claim.

    Args:
        id: Its number in the report.
        name: A short name.
        statement: The claim as a sentence that is true or false.
        paper: The place in the paper; "ours" if the claim goes beyond it.
        study: The study with the rows.
        parts: The comparisons.
        needs: Whether all parts must hold, or any of them.
        favours: Choices of this library that favour the claim or work against it.
    """

    id: str
    name: str
    statement: str
    paper: str
    study: str
    parts: tuple[ClaimPart, ...]
    needs: Literal["all", "any"] = "all"
    favours: tuple[str, ...] = ()


NORMALISED = (
    ("batchnorm", "identity"), ("layernorm", "center"), ("softmax-positions", "exp"), ("relu-l1", "center-relu"),
)  # fmt: skip
"""Pairs of rows with and without normalisation (batch statistics, over kernels, over positions). Their other two roles
are equal."""
COUNTED = (("identity", "identity-raw"), ("relu", "relu-raw"), ("exp", "exp-raw"))
NOT_SOFTMAX = ("batchnorm", "layernorm", "l1", "relu-l1")


def _faster(row: str) -> tuple[ClaimPart, ...]:
    return tuple(ClaimPart(versus(row, "softmax"), measure, "superiority") for measure in (EPOCHS, AREA))


_ONE_RATE = "at the shared learning rate, which was not tuned for any row"
_FASTER = (
    "the target is softmax's own accuracy less one point, fixed by separate seeds: a lower target would favour rows "
    "that start fast, a higher one rows that end high",
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1", "Normalisation matters",
        "Pipelines that normalise the scores end higher than the same pipelines without normalisation.",
        "section 5.2", "softmax",
        (ClaimPart(factor("normalised − not, over four pairs", NORMALISED), ACCURACY, "superiority"),),
        favours=("division by the number of kernels (count) does not count as normalisation here", _ONE_RATE),
    ),
    Claim(
        "C1b", "Normalisation matters, with count as one",
        "Division by the number of kernels (count) already gives what normalisation gives: pipelines without any scale "
        "end lower.",
        "section 5.2, another reading", "softmax",
        (ClaimPart(factor("with count − without, over three pairs", COUNTED), ACCURACY, "superiority"),),
        favours=("a pipeline without any scale changes the scale of the mixer's output at the start, and one learning "
                 "rate for all favours the rows it was chosen on",),
    ),
    Claim(
        "C2", "It need not be softmax",
        "A normalised pipeline other than softmax ends no lower than softmax.",
        "section 5.2", "softmax",
        tuple(ClaimPart(versus(row, "softmax"), ACCURACY, "non-inferiority") for row in NOT_SOFTMAX),
        needs="any",
        favours=("any of four pipelines may show it; Holm's correction pays for the choice",),
    ),
    Claim(
        "C3", "ReLU converges faster",
        "With relative position, ReLU in the place of softmax reaches the validation target in fewer epochs, and its "
        "curve lies higher.",
        "section 5.2 and abstract", "softmax", _faster("relu"), favours=_FASTER,
    ),
    Claim(
        "C3b", "LayerNorm converges faster",
        "With relative position, LayerNorm in the place of softmax reaches the validation target in fewer epochs, and "
        "its curve lies higher.",
        "abstract", "softmax", _faster("layernorm"), favours=_FASTER,
    ),
    Claim(
        "C4", "They end no lower",
        "With relative position, ReLU and LayerNorm end no lower than softmax.",
        "section 5.2 and abstract", "softmax",
        tuple(ClaimPart(versus(row, "softmax"), ACCURACY, "non-inferiority") for row in ("relu", "layernorm")),
        favours=("a loss of less than a point counts as none",),
    ),
    Claim(
        "C5", "Depth-wise self-attention costs less and is as good",
        "Depth-wise self-attention ends no lower than softmax attention, with fewer parameters, fewer multiply-adds "
        "and less measured time.",
        "section 5.3 and abstract", "depthwise",
        (ClaimPart(versus("dwsa", "softmax"), ACCURACY, "non-inferiority"),
         ClaimPart(versus("dwsa", "softmax"), PARAMS, "superiority"),
         ClaimPart(versus("dwsa", "softmax"), MACS, "superiority"),
         ClaimPart(versus("dwsa", "softmax"), TIME, "superiority")),
        favours=("time is that of training epochs as recorded: runs that share a machine disturb each other",
                 "both sides run on the fastest implementation that kernelbank has for them"),
    ),
    Claim(
        "C6a", "The relative position helps depth-wise self-attention",
        "Gate and positional term together end higher than the gate alone.",
        "section 5.3", "depthwise",
        (ClaimPart(versus("dwsa", "gate"), ACCURACY, "superiority"),),
        favours=("the gate alone mixes no positions, so that a backbone of it depends on its trunk to do so",),
    ),
    Claim(
        "C6b", "The gate helps depth-wise self-attention",
        "Gate and positional term together end higher than the positional term alone, a static convolution.",
        "ours", "depthwise",
        (ClaimPart(versus("dwsa", "position"), ACCURACY, "superiority"),),
        favours=("the positional term alone is built as a convolution, with a bias and an initialisation of its own",),
    ),
    Claim(
        "C6c", "Untying the position per channel changes little",
        "A positional term per channel in place of one per head changes the accuracy by less than a point.",
        "ours", "depthwise",
        (ClaimPart(versus("dwsa-untied", "dwsa"), ACCURACY, "equivalence"),),
        favours=("few seeds give wide intervals, which favours no verdict at all",),
    ),
    Claim(
        "C7", "The temperature matters little",
        "A temperature of 1/4, 1/2, 2 or 4 changes softmax by less than a point.",
        "section 5.2, where tau is a parameter", "assumptions",
        tuple(ClaimPart(versus(f"softmax-{row}", "softmax"), ACCURACY, "equivalence")
              for row in ("colder", "cold", "warm", "warmer")),
        favours=("the temperature is fixed; the model may rescale its queries to undo it",),
    ),
    Claim(
        "C8", "The replacement depends on relative position",
        "ReLU and LayerNorm gain more on softmax with relative positions than with absolute ones.",
        "section 5.2", "softmax",
        tuple(ClaimPart(interaction(row, "softmax", "absolute"), ACCURACY, "superiority")
              for row in ("relu", "layernorm")),
        favours=("a difference of differences has twice the spread of a difference: few seeds decide nothing",),
    ),
)  # fmt: skip
"""The claims in the order of the report."""
