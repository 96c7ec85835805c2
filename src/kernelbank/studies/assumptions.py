"""The assumptions study: how much the choices that the paper leaves open matter (docs/assumptions.md)."""

from __future__ import annotations

from kernelbank.studies.study import Study, activation_rows

# label, activation, the choice.
ROWS = (
    ("softmax", "softmax", "the baseline, at temperature 1 on top of d^-1/2"),
    ("softmax-cold", "softmax(0.5)", "temperature 1/2"),
    ("softmax-warm", "softmax(2)", "temperature 2"),
    ("softmax-colder", "softmax(0.25)", "temperature 1/4"),
    ("softmax-warmer", "softmax(4)", "temperature 4"),
    ("relu-n", "relu,count", "ReLU over n: ours"),
    ("relu-sqrt-n", "relu,sqrt_count", "ReLU over the square root of n"),
    ("relu-raw", "relu", "ReLU without a scale"),
    ("layernorm-n", "layernorm,count", "LayerNorm over the kernels, then 1/n: ours"),
    ("layernorm-sqrt-n", "layernorm,sqrt_count", "LayerNorm over the kernels, then one over the square root of n"),
    ("layernorm-raw", "layernorm", "LayerNorm over the kernels, no scale after it"),
    ("layernorm-positions", "layernorm@positions,count", "LayerNorm over the positions that see a kernel"),
)


def assumptions() -> Study:
    """Twelve pipelines with relative positions."""
    return Study(
        name="assumptions",
        title="How much do the choices that the paper leaves open matter?",
        questions=(
            "The scale of ReLU: 1/n, one over its square root, or none?",
            "LayerNorm: over which axis, and with which scale after it?",
            "The temperature of softmax: how flat is its optimum?",
        ),
        baseline="softmax",
        rows=activation_rows(ROWS),
    )
