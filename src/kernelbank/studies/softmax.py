"""Study 1 of the paper (section 5.2): what does softmax do in attention?"""

from __future__ import annotations

from kernelbank.studies.study import Study, activation_rows

# label, activation, what it isolates. Every one of the eight subsets of the three roles has a row.
ROLE_ROWS = (
    ("softmax", "softmax", "all three roles: exp is not linear, l1 normalises and lets the kernels communicate"),
    ("identity", "identity,count", "no role: the two steps fuse into one linear kernel (1/n keeps the scale)"),
    ("relu", "relu,count", "non-linearity alone, as ConvNets have it"),
    ("exp", "exp,count", "non-linearity alone, softmax's own: what is left of it without normalisation"),
    ("sigmoid", "log_count,sigmoid", "non-linearity alone, of the sigmoid shape that ConvNets gave up"),
    ("batchnorm", "batchnorm,count", "normalisation alone: by batch statistics, kernels do not see each other"),
    ("center", "center,count", "communication alone: the mean over kernels is subtracted, nothing is rescaled"),
    ("layernorm", "layernorm,count", "normalisation and communication: the paper's LayerNorm over kernels"),
    ("l1", "l1", "normalisation and communication: softmax without its exp, signs kept"),
    ("softmax-positions", "softmax@positions", "normalisation and non-linearity: over the positions that see a kernel"),
    ("center-relu", "center,relu,count", "communication and non-linearity: above the mean or not"),
    ("relu-l1", "relu,l1", "all three roles with ReLU in the place of exp"),
)


# Without the division by the number of kernels: whether this scale, which is not a role, does the work.
RAW_ROWS = (
    ("identity-raw", "identity", "no role and no scale"),
    ("relu-raw", "relu", "non-linearity alone, without a scale"),
    ("exp-raw", "exp", "softmax's non-linearity, without a scale"),
)
# With the rows above: normalisation (none, batchnorm, rmsnorm) by communication (no, yes) by non-linearity (identity,
# relu, exp). An rmsnorm over the kernels lets them communicate, over the positions it does not.
FACTORIAL_ROWS = (
    ("center-exp", "center,exp,count", "communication and softmax's non-linearity"),
    ("batchnorm-relu", "batchnorm,relu,count", "normalisation by batch statistics and non-linearity"),
    ("batchnorm-exp", "batchnorm,exp,count", "normalisation by batch statistics and softmax's non-linearity"),
    ("center-batchnorm", "center,batchnorm,count", "communication, and normalisation by batch statistics"),
    ("rmsnorm-positions", "rmsnorm@positions,count", "normalisation alone: over the positions that see a kernel"),
    ("layernorm-relu", "layernorm,relu,count", "all three roles: LayerNorm over kernels, then ReLU"),
    ("layernorm-exp", "layernorm,exp,count", "all three roles: LayerNorm over kernels, then exp"),
)
# The pipelines of the roles again, their outputs at the start as large as softmax's: a difference between softmax and
# a row that is gone with it was one of scale.
SCALED_ROWS = tuple(
    (f"{label}-scaled", f"{steps},scale({{scale}})", f"{label}, with the scale of softmax's outputs at the start")
    for label, steps, _ in ROLE_ROWS
    if label != "softmax"
)
ABSOLUTE_ROWS = (
    ("softmax-absolute", "softmax", "softmax with the positions of the host's trunk alone"),
    ("relu-absolute", "relu,count", "ReLU with the positions of the host's trunk alone"),
    ("layernorm-absolute", "layernorm,count", "LayerNorm with the positions of the host's trunk alone"),
)


def softmax() -> Study:
    """Pipelines with relative positions, and three with the positions of the host's trunk alone.

    The first twelve are a full factorial over the three roles that section 5.2 names (the role columns of the table
    are derived from the pipelines), with a second pipeline where softmax's own part and the usual substitute differ.
    The others drop the division by the number of kernels, tell kinds of normalisation and non-linearity apart, or have
    the scale of softmax at the start.
    """
    return Study(
        name="softmax",
        title="What does softmax do in attention?",
        questions=(
            "Which of its roles matters: normalisation, communication between kernels, or non-linearity?",
            "With relative positions, can ReLU or LayerNorm replace it, and do they converge faster?",
        ),
        baseline="softmax",
        rows=(
            *activation_rows(ROLE_ROWS + RAW_ROWS + FACTORIAL_ROWS + SCALED_ROWS),
            *activation_rows(ABSOLUTE_ROWS, position="none"),
        ),
    )
