"""What ``--help`` prints: usage, the options of a verb in sections, and two examples."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable
from typing import Any

from kernelbank.commands.fields import Option, options_of

WIDEST = 120
COLUMN = 26
"""The width of a terminal that is used, and the column where descriptions begin."""

_DATA = "img_size cache download workers max_broken train_images memory_share"
_HARDWARE = "device precision parallel micro_batch sync_batchnorm grad_checkpointing channels_last deterministic"
_RECIPE = {
    "optimiser and schedule": "optimiser weight_decay betas eps clip_grad layer_decay lr_batch lr_rule schedule "
    "warmup_epochs warmup_lr warmup_prefix min_lr drop_last",
    "augmentation": "scale ratio flip auto_augment color_jitter interpolation erase erase_mode shift repeats mixup "
    "cutmix mixup_prob mixup_switch_prob",
    "regularisation, averaging and evaluation": "drop_path label_smoothing ema crop_pct temperature temperature_epochs",
}
SECTIONS: dict[str, dict[str, str]] = {
    "atlas": {
        "output": "models prove coverage figure json",
        "size of the mixer": "dim heads grid prefix",
    },
    "convert": {
        "common options": "to model img_size mixer",
        "what is read": "entry untrained",
        "output": "require_proof json",
    },
    "benchmark": {
        "common options": "batch img_size train explain",
        "size of single mixers": "grid dim heads",
        "measurement": "rounds threads bf16 memory",
        "output": "out figure json",
    },
    "study": {
        "common options": "quick dry_run data models recipe rows seeds out",
        "design and model": "design model_args",
        "runs and machines": "jobs shard on",
        "output": "tracker json",
        "data": _DATA,
        "hardware": _HARDWARE,
        "length and rate": "epochs batch_size lr",
        **_RECIPE,
    },
    "train": {
        "common options": "data recipe mixer out seed resume show",
        "model": "mlp pretrained initial_checkpoint model_args",
        "length and rate": "epochs batch_size lr",
        "output": "tracker json",
        "data": _DATA,
        "hardware": _HARDWARE,
        **_RECIPE,
    },
    "evaluate": {
        "common options": "data split ema batch_size crop_pct json",
        "model": "mixer mlp pretrained initial_checkpoint model_args",
        "data": _DATA,
        "hardware": _HARDWARE,
    },
    "compare": {"output": "figure json"},
    "report": {"output": "out json"},
    "explain": {
        "common options": "against pretrained out",
        "models and pictures": "mixer against_mixer img_size classes layers",
        "figures and numbers": "png position curves json",
    },
    "export": {
        "common options": "pretrained mixer img_size",
        "form of the file": "half batch dynamic_size form opset",
        "output": "classes overwrite json",
    },
}
"""The sections of a verb's options, the common ones first. Every option of the verb is in one of them."""

EXAMPLES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "atlas": (
        ("kernelbank atlas", "the table of all rows"),
        (
            "kernelbank atlas 'vit kernel=depthwise mix=mean' --figure dwsa.svg",
            "one spec in full, and its figure",
        ),
    ),
    "convert": (
        ("kernelbank convert deit_tiny_patch16_224 ours.safetensors", "timm's published weights as a file of ours"),
        (
            "kernelbank convert ours.safetensors theirs.safetensors --to huggingface",
            "the same under other names",
        ),
    ),
    "benchmark": (
        ("kernelbank benchmark deit_small_patch16_224 'vit_kb_small_patch16_224 : dwsa'", "two models in turns"),
        ("kernelbank benchmark --explain dwsa --grid 14 28", "why a mixer runs on which path"),
    ),
    "study": (
        ("kernelbank study softmax --quick", "four rows on scikit-learn's digits, in less than a minute"),
        (
            "kernelbank study softmax --data /data/imagenet --models vit_kb_small_patch16_224 --recipe paper --dry-run",
            "what the paper's study would take on this machine",
        ),
    ),
    "train": (
        ("kernelbank train plain --data digits --recipe digits", "a small model on scikit-learn's digits, in seconds"),
        (
            "kernelbank train vit_small_patch16_224 --pretrained --data pets/ --recipe finetune --mixer relu_attention",
            "a stock model of timm with another activation, fine-tuned",
        ),
    ),
    "evaluate": (
        ("kernelbank evaluate runs/plain-digits-seed0 --data digits --split test", "a run on the test split"),
        ("kernelbank evaluate vit_small_patch16_224 --pretrained --data /data/imagenet", "timm's published weights"),
    ),
    "compare": (
        ("kernelbank compare runs/softmax runs/relu", "two runs: a table, and curves in compare.png"),
        ("kernelbank compare runs/softmax-* runs/relu-* --figure seeds.svg", "several seeds of each, with intervals"),
    ),
    "report": (
        ("kernelbank report runs/softmax", "the page runs/softmax/report.html"),
        ("kernelbank report records --out report.html --json", "the page, and its numbers on the terminal"),
    ),
    "explain": (
        ("kernelbank explain vit_small_patch16_224 photo.jpg --pretrained", "the page explain.html"),
        ("kernelbank explain runs/softmax photo.jpg --against runs/relu --layers 0 -1 --out pair.html", "two runs"),
    ),
    "export": (
        ("kernelbank export vit_small_patch16_224 model.onnx --pretrained", "timm's published weights as ONNX"),
        ("kernelbank export runs/relu model.pt2 --half bfloat16", "a run as a program of torch.export"),
    ),
}
"""Two examples of each verb: the command and what it does."""


def help_text(kind: type[Any], verb: str, default: Any = None) -> str:
    """Return the help of a verb whose options are the dataclass `kind`, with the values of `default` as defaults."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    options = {option.name: option for option in options_of(kind, default)}
    positional = [option for option in options.values() if option.positional]
    usage = " ".join(["usage: kernelbank", verb, *(option.placeholder for option in positional), "[options]"])
    parts = [usage, textwrap.fill(" ".join((inspect.getdoc(kind) or "").split()), width)]
    if positional:
        parts.append(_section("arguments", positional, width))
    for title, names in SECTIONS[verb].items():
        parts.append(_section(title, [options[name] for name in names.split()], width))
    examples = [f"  # {what}\n  {command}" for command, what in EXAMPLES[verb]]
    return "\n\n".join([*parts, "\n".join(["examples:", *examples])])


def _section(title: str, options: Iterable[Option], width: int) -> str:
    return "\n".join([f"{title}:", *(_entry(option, width) for option in options)])


def _entry(option: Option, width: int) -> str:
    """An option and its description, beside it or on the next line."""
    default = f" (default: {option.default})" if option.default else ""
    described = textwrap.wrap(option.doc + default, max(width - COLUMN, 20), break_on_hyphens=False)
    head = f"  {option.invocation}"
    first = f"{head:<{COLUMN}}" if len(head) <= COLUMN - 2 else f"{head}\n{'':<{COLUMN}}"
    return first + f"\n{'':<{COLUMN}}".join(described)
