"""Section 6 of the paper: kernels of 3 x 3, a bank on a coarser grid, blocks without an FFN."""

from __future__ import annotations

from kernelbank.studies.study import Study, StudyRow

_ATTENTION = "position=relative activation=softmax"
_FLAT = "support=all position=none activation=softmax"
_DEPTHWISE = "kernel=depthwise mix=mean activation=none support=all position=relative"


def future() -> Study:
    """What the paper leaves for the future, one change at a time.

    With size 3 the key kernels of attention, and the kernels of depth-wise self-attention, have 3 x 3 taps; value
    kernels are 1 x 1 by definition. A strided bank generates its kernels on the pooled grid, where relative positions
    do not exist, so that it is compared with a flat bank without them. Of the two replacements of the FFN, attention to
    a learned bank of 3 C kernels has exactly the multiply-adds of the FFN (8 C^2 for each position), and a second mixer
    has those of the mixer, which the table states.
    """
    rows = (
        StudyRow("softmax", "softmax attention with relative positions (in the windows of the host, if it has them)",
                 _ATTENTION),
        StudyRow("softmax-3", "the same with key kernels of 3 x 3", f"{_ATTENTION} size=3"),
        StudyRow("dwsa", "depth-wise self-attention over all kernels", _DEPTHWISE),
        StudyRow("dwsa-3", "the same with kernels of 3 x 3", f"{_DEPTHWISE} size=3"),
        StudyRow("flat", "softmax attention over the kernels of all positions, without relative positions",
                 f"{_FLAT} bank=dynamic"),
        StudyRow("flat-3", "the same with key kernels of 3 x 3: is their spatial prior enough?",
                 f"{_FLAT} bank=dynamic size=3"),
        StudyRow("strided", "a hierarchical bank: kernels generated on the grid pooled 2 x 2",
                 f"{_FLAT} bank=dynamic(stride=2)"),
        StudyRow("strided-3", "the same with key kernels of 3 x 3", f"{_FLAT} bank=dynamic(stride=2) size=3"),
        StudyRow("no-mlp", "the baseline without FFNs, at fewer multiply-adds", _ATTENTION, mlp="none"),
        StudyRow("two-mixers", "the baseline with a second mixer in the place of each FFN", _ATTENTION, mlp="{mixer}"),
        StudyRow("memory", "the baseline with attention to 3 C learned kernels in the place of each FFN, at equal "
                 "multiply-adds", _ATTENTION, mlp="external_attention bank=static(3C)"),
    )  # fmt: skip
    return Study(
        name="future",
        title="Larger kernels, hierarchical banks, no FFN",
        questions=(
            "Do dynamic kernels of 3 x 3 help, and do they replace relative positions?",
            "Does a bank on a coarser grid keep the accuracy at fewer multiply-adds?",
            "Is the FFN needed, or does another mixer do in its place?",
        ),
        baseline="softmax",
        rows=rows,
    )
