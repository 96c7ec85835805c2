"""Find the weights in what a file holds: a state dict alone, or a training checkpoint that holds several."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from kernelbank.errors import InputError
from kernelbank.text import suggest
from kernelbank.weights.keymap import State, listed

ENTRIES = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher", "model", "state_dict", "model_state",
    "model_state_dict", "module", "student",
)  # fmt: skip
"""The keys under which training scripts store weights, in the order in which they are taken: averaged weights before
others, as timm does, and DINO's teacher, which is the model that it publishes, before its student."""
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""Prefixes of every key: DistributedDataParallel, torch.compile, and the names of a model in Lightning's modules."""
TRUNKS = ("backbone.", "encoder.", "visual.trunk.", "visual.", "trunk.", "timm_model.", "vision_model.")
"""Prefixes of a backbone inside a larger model: DINO, mmpretrain and detectors, MAE, OpenCLIP, transformers."""
OTHER_PARTS: Mapping[str, str] = {
    "criterion.": "the loss of the training script",
    "loss.": "the loss of the training script",
    "loss_fn.": "the loss of the training script",
    "dino_loss.": "the loss of DINO",
    "ibot_patch_loss.": "the loss of iBOT",
    "dino_head.": "the projection head of DINO",
    "ibot_head.": "the projection head of iBOT",
    "head.mlp.": "the projection head of DINO",
    "head.last_layer.": "the projection head of DINO",
    "decoder.": "the decoder of masked pre-training",
    "decoder_": "the decoder of masked pre-training",
    "mask_token": "the token of masked patches, which images without a mask do not use",
    "text.": "the text tower",
    "text_model.": "the text tower",
    "text_projection": "the text tower",
    "logit_scale": "the loss of CLIP",
    "logit_bias": "the loss of SigLIP",
}
"""The beginnings of the keys of parts that are not of the vision model, with the reason for dropping them."""
UNHELD: Mapping[str, str] = {
    r"\.mlp\.(w12|w1|w2|w3|fc1_g|weights_in)\.": "SwiGLU in the MLPs",
    r"(^|\.)(dist_token|distillation_token)$": "the distillation token of DeiT",
    r"(^|\.)attn_pool\.": "attention pooling",
    r"\.attn\.(q_bias|v_bias)$": "biases of BEiT, which has none on the keys",
    r"(^|\.)rel_pos_bias\.": "one relative position bias for all blocks",
    r"^(embeddings|vit)\..*relative_position": "the relative position bias of BEiT",
    r"(^|\.)(rope|freqs)": "rotary position embeddings",
}
"""Patterns of the keys of parts that no trunk of ours has a place for, and the names of these parts."""


@dataclass(frozen=True)
class Contents:
    """A state dict as it was found in a file.

    Attributes:
        state: The tensors, without `prefix`.
        entry: The keys under which the state dict was found, from the outside.
        others: The other state dicts beside it.
        prefix: What was removed before every key.
        metadata: The metadata of a safetensors file.
    """

    state: State
    entry: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    prefix: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was taken, in words: the entry, the others that were left, and the prefix. Empty for a state dict
        alone."""
        taken = f"taken: the weights under {'.'.join(self.entry)}"
        left = f", not {', '.join(self.others)} (--entry takes another)" if self.others else ""
        removed = f"prefix: {self.prefix} removed from every key"
        return (taken + left,) * bool(self.entry) + (removed,) * bool(self.prefix)


def find(loaded: object, what: str, entry: str | None = None) -> Contents:
    """Return the state dict in `loaded`, plain or under one of `ENTRIES`, without `WRAPPERS` before its keys. `entry`
    names the key of the outermost dictionary that is taken, where there are several.

    Raises:
        InputError: If there are no tensors, values that are not tensors, or no such entry.
    """
    path, others = [], tuple[str, ...]()
    if entry is not None:
        inside = {str(key): value for key, value in loaded.items()} if isinstance(loaded, Mapping) else {}
        if not isinstance(inside.get(entry), Mapping):
            raise InputError(f"{what}: no entry {entry!r}{suggest(entry, inside)}; expected one of "
                             f"{', '.join(_entries(loaded)) or 'none, as its weights lie at the top'}")  # fmt: skip
        path, others = [entry], tuple(name for name in _entries(loaded) if name != entry)
        loaded = inside[entry]
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        names = _entries(loaded)
        if not names:
            break
        path.append(names[0])
        others, loaded = (*others, *names[1:]), loaded[names[0]]
    state = _tensors(loaded, what)
    prefix = shared_prefix(state, WRAPPERS)
    return Contents(without(state, prefix), tuple(path), others, prefix)


def _entries(loaded: object) -> list[str]:
    """The keys of `ENTRIES` under which there are dictionaries that are not empty."""
    return [key for key in ENTRIES if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)
            and loaded[key]]  # fmt: skip


def _tensors(loaded: object, what: str) -> State:
    """Return a state dict whose values are tensors that a model can have. Raises InputError naming the others."""
    if not isinstance(loaded, Mapping) or not loaded:
        content = listed(map(str, loaded)) if isinstance(loaded, Mapping) else type(loaded).__name__
        raise InputError(f"{what}: no state dict, but {content or 'nothing'}; expected one, plain or under "
                         f"{', '.join(ENTRIES)}")  # fmt: skip
    if strange := [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]:
        raise InputError(f"{what}: {listed(strange)} {'is no tensor' if len(strange) == 1 else 'are no tensors'}")
    state = {str(key): value.detach() for key, value in loaded.items()}
    if complex_ones := [key for key, value in state.items() if value.is_complex()]:
        raise InputError(f"{what}: {listed(complex_ones)}: complex numbers; expected real ones")
    if empty := [key for key, value in state.items() if value.numel() == 0]:
        raise InputError(f"{what}: {listed(empty)}: no numbers; expected at least one")
    return state


def shared_prefix(keys: Iterable[str], prefixes: tuple[str, ...]) -> str:
    """The longest beginning of all keys that consists of `prefixes`, in any order and number. It is empty if a key
    would be empty without it."""
    keys, shared = list(keys), ""
    while keys and (found := next((p for p in prefixes if all(_inside(key, shared + p) for key in keys)), "")):
        shared += found
    return shared


def _inside(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and key != prefix


def without(state: Mapping[str, Tensor], prefix: str) -> State:
    """`state` with `prefix` removed from every key."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items()}


def other_parts(keys: Iterable[str]) -> dict[str, str]:
    """The keys that begin as one of `OTHER_PARTS`, with the reason for dropping each."""
    found = {}
    for key in keys:
        reason = next((reason for part, reason in OTHER_PARTS.items() if key.startswith(part)), None)
        if reason is not None:
            found[key] = reason
    return found


def check_held(keys: Iterable[str], where: str) -> None:
    """Raise InputError, naming the part and its tensors, if `keys` are of a part that no trunk has a place for."""
    keys = list(keys)
    for pattern, part in UNHELD.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise InputError(f"{where}: no place for {listed(found)}: our trunks do not have {part}")
