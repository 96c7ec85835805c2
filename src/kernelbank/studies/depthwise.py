"""Study 2 of the paper (section 5.3): the kernel bank of attention with depth-wise kernels."""

from __future__ import annotations

from kernelbank.studies.study import WINDOW, Study, StudyRow, both

# The extent of an H x H grid is 2H - 1: 7 on the 4 x 4 grid of both models, 3 on the 2 x 2 grid of the last stage.
TIED = "dwconv kernel=grouped(host) size={} frame=linear"
FREE = "dwconv size={} frame=linear"


def depthwise() -> Study:
    """From softmax attention to depth-wise self-attention and to static convolutions, a step at a time.

    With A the mean over the kernels seen, depth-wise self-attention is o_i = q_i * A(k) + sum_j p_ij k_j: a gate
    per channel and a positional term. ``gate`` is the first term alone (position=none). ``position`` is exactly the
    second alone: k is a 1 x 1 conv of the input and p depends on i - j and the head only, so the term is a static
    convolution with one kernel per head, as large as the offsets of the grid. Unlike the table, the convolution of this
    row has a bias, and it is initialised as a convolution.
    """
    last, tied, free = " | ", TIED.format, FREE.format
    rows = (
        StudyRow("softmax", "softmax attention with relative positions (Swin's windows when hierarchical)",
                 both("vit_relpos", f"swin {WINDOW}")),
        StudyRow("softmax-no-position", "the same without relative positions",
                 both("vit", f"swin {WINDOW} position=none")),
        StudyRow("identity", "no activation: the key and value kernels fuse into one",
                 both("identity_attention", f"identity_attention {WINDOW}")),
        StudyRow("dwsa", "depth-wise self-attention: gate and positional term, all kernels",
                 both("dwsa", "dwsa")),
        StudyRow("dwsa-window", "depth-wise self-attention, the kernels of shifted windows",
                 both(f"dwsa_window {WINDOW}", f"dwsa_window {WINDOW}")),
        StudyRow("gate", "its gate alone: one weight per channel and image, no position mixes with another",
                 both("dwsa position=none", "dwsa position=none")),
        StudyRow("gate-window", "its gate alone, the kernels of shifted windows",
                 both(f"dwsa_window {WINDOW} position=none", f"dwsa_window {WINDOW} position=none")),
        StudyRow("position", "its positional term alone: a static convolution, tied inside a head, over the whole "
                 "grid in both models; drawn and biased as a convolution is",
                 both(tied(7), tied(7) + last + tied(3))),
        StudyRow("dwconv-grid", "the same with a kernel per channel: a static depth-wise convolution over the grid",
                 both(free(7), free(7) + last + free(3))),
        StudyRow("dwconv-3", "a static depth-wise convolution of 3 x 3",
                 both(free(3), free(3))),
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
        quick=("softmax", "dwsa", "gate", "position"),
    )
