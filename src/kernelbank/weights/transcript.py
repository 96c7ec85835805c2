"""Print a conversion as text or JSON."""

from __future__ import annotations

import json
from typing import Any

from kernelbank.model import SwinTrunk, TimmTrunk, ViTTrunk
from kernelbank.weights.session import Outcome, Request, Status, run


def convert(request: dict[str, Any], status: Status, as_json: bool) -> str:
    """Run the conversion of a `Request`, given by its fields, and return its transcript, or the outcome as JSON. Raises
    InputError and SpecError as `session.run`."""
    outcome = run(Request(**request), status)
    return json.dumps(document(outcome), indent=2, allow_nan=False) if as_json else "\n".join(lines(outcome))


def lines(outcome: Outcome) -> list[str]:
    """Return the transcript, which lists what was read, assumed, dropped, translated, proved and written."""
    source, size = outcome.source, outcome.path.stat().st_size / 1e6
    text = [f"read: {_described(outcome)}"]
    text += source.said
    text += [f"assumed: {', '.join(source.assumed)}"] * bool(source.assumed)
    text += [f"dropped: {key}: {reason}" for key, reason in source.dropped.items()]
    text += [f"keys: {_counted(outcome)} -> {len(outcome.state)} of {outcome.to.name}, none left over",
             f"back: {len(source.remaining)} tensors bit-equal", _proof(outcome)]  # fmt: skip
    if outcome.to.library.holds_specs:
        text += [f"specs: {outcome.spec.mixer}; mlp {outcome.spec.mlp}"]
    return [*text, *([str(outcome.replaced)] if outcome.replaced else []), f"wrote: {outcome.path}, {size:.1f} MB"]


def _described(outcome: Outcome) -> str:
    source, trunk = outcome.source, outcome.source.spec.trunk
    if isinstance(trunk, TimmTrunk):
        return f"{source.dialect.name}, {trunk.name} of timm"
    assert isinstance(trunk, (ViTTrunk, SwinTrunk))
    depths, patch, image = trunk.depths, trunk.patch_size, source.spec.image
    return (f"{source.dialect.name}, {trunk.family}, {' + '.join(map(str, depths))} blocks from {trunk.embed_dim} "
            f"channels, heads {' '.join(map(str, trunk.heads))}, patches of {patch[0]} x {patch[1]}, images of "
            f"{image[0]} x {image[1]}")  # fmt: skip


def _counted(outcome: Outcome) -> str:
    source = outcome.source
    text = f"{len(source.state)} tensors of {source.dialect.name}"
    return text + (f" ({len(source.derived)} of them buffers that follow from the model)" if source.derived else "")


def _proof(outcome: Outcome) -> str:
    """``proved: max |difference| 3.1e-07 on 2 random images through timm and kernelbank``."""
    proof = outcome.proof
    if isinstance(proof, str):
        return f"not proved: {proof}"
    through = f"{outcome.source.dialect.owner} and {outcome.to.owner}"
    difference = (f"max |difference| {proof.difference:.1e} on {proof.images} random images through {through}, outputs "
                  f"up to {proof.scale:.1e}")  # fmt: skip
    if outcome.proved:
        return f"proved: {difference}"
    return f"compared: keys and shapes proved; outputs equal if the assumptions hold ({difference})"


def document(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as a JSON document."""
    source, proof = outcome.source, outcome.proof
    compared = {"not_proved": proof} if isinstance(proof, str) else {
        "difference": proof.difference, "scale": proof.scale, "images": proof.images,
    }  # fmt: skip
    return {
        "from": source.dialect.name, "to": outcome.to.name, "family": source.spec.trunk.family,
        "tensors": {"source": len(source.state), "derived": len(source.derived), "target": len(outcome.state)},
        "dropped": dict(source.dropped), "assumed": list(source.assumed), "back": "bit-equal",
        "notes": list(source.said), "proved": outcome.proved, "proof": compared, "path": str(outcome.path),
        "specs": {"mixer": outcome.spec.mixer, "mlp": outcome.spec.mlp} if outcome.to.library.holds_specs else None,
        "tensors_replaced": None if outcome.replaced is None else [
            {"tensor": line.name, "verdict": line.verdict, "how": line.how} for line in outcome.replaced.lines
        ],
    }  # fmt: skip
