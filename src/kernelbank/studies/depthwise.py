"""Study 2 of the paper (section 5.3): the kernel bank of attention with depth-wise kernels."""

from __future__ import annotations

from kernelbank.studies.study import Study, StudyRow

_ATTENTION = "position=relative activation="
_ALL = "kernel=depthwise mix=mean activation=none support=all"
_WINDOW = "kernel=depthwise mix=mean activation=none support={window}"
_STATIC = "bank=static(1) support=all mix=mean activation=none position=none frame=linear"


def depthwise() -> Study:
    """From softmax attention to depth-wise self-attention and to static convolutions, one change at a time.

    With A the mean over the visible kernels, depth-wise self-attention is o_i = q_i * A(k) + sum_j p_ij k_j: a gate per
    channel and a positional term. ``gate`` is the first term alone (position=none). ``position`` is the second term
    alone: k is a 1 x 1 convolution of the input and p depends only on i - j and the head, so that the term is a static
    convolution with one kernel per head, whose size is the number of offsets of the grid. Unlike the relative table,
    this convolution has a bias, and it is initialised as a convolution.
    """
    rows = (
        StudyRow("softmax", "softmax attention with relative positions (in the windows of the host, if it has them)",
                 f"{_ATTENTION}softmax"),
        StudyRow("softmax-no-position", "the same without relative positions",
                 "position=none activation=softmax"),
        StudyRow("identity", "no activation: the key and value kernels fuse into one",
                 f"{_ATTENTION}identity,count"),
        StudyRow("dwsa", "depth-wise self-attention: gate and positional term, all kernels",
                 f"{_ALL} position=relative"),
        StudyRow("dwsa-window", "depth-wise self-attention, the kernels of shifted windows",
                 f"{_WINDOW} position=relative"),
        StudyRow("gate", "its gate alone: one weight per channel and image, no position mixes with another",
                 f"{_ALL} position=none"),
        StudyRow("gate-window", "its gate alone, the kernels of shifted windows",
                 f"{_WINDOW} position=none"),
        StudyRow("position", "its positional term alone: a static convolution, tied inside a head, over the whole "
                 "grid of every stage; drawn and biased as a convolution is",
                 f"{_STATIC} kernel=grouped(host) size={{extent}}"),
        StudyRow("dwconv-grid", "the same with a kernel per channel: a static depth-wise convolution over the grid",
                 f"{_STATIC} kernel=depthwise size={{extent}}"),
        StudyRow("dwconv-3", "a static depth-wise convolution of 3 x 3",
                 f"{_STATIC} kernel=depthwise size=3"),
    )  # fmt: skip
    return Study(
        name="depthwise",
        title="Depth-wise self-attention: the gate, the positional term, and static kernels",
        questions=(
            "Does depth-wise self-attention stand beside softmax attention at fewer parameters and multiply-adds?",
            "Which of its two terms carries it: the gate or the relative position?",
            "Does the dynamic bank add anything to a static depth-wise convolution?",
        ),
        baseline="softmax",
        rows=rows,
    )
