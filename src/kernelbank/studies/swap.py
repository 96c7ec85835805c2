"""Train with softmax, change the activation, go on: how many epochs of fine-tuning does the change take?"""

from __future__ import annotations

from kernelbank.studies.study import FineTuning, Study, StudyRow

EPOCHS = (1, 5, 10)
_PIPELINES = {"softmax": "softmax", "relu": "relu,count", "layernorm": "layernorm,count"}


def swap() -> Study:
    """Pipelines from scratch, and in the place of softmax in a trained model.

    A fine-tuned row starts from the weights at the end of the run of softmax with the same seed; these pipelines keep
    all of them. Before its first update its validation top-1 is measured, which is that of 0 epochs. Softmax itself
    goes on as well, so that what the change costs is not mixed with what more epochs give.
    """
    scratch = [
        StudyRow(label, f"{label} from scratch", f"position=relative activation={steps}")
        for label, steps in _PIPELINES.items()
    ]
    tuned = [
        StudyRow(f"{label}-{epochs}", f"{label} from the weights of softmax, {epochs} more",
                 f"position=relative activation={steps}", fine_tuning=FineTuning("softmax", epochs))
        for label, steps in _PIPELINES.items()
        for epochs in EPOCHS
    ]  # fmt: skip
    return Study(
        name="swap",
        title="Another activation in a model that was trained with softmax",
        questions=(
            "How much of a trained model survives a change of its activation, before any update?",
            "How many epochs of fine-tuning bring it to where training from scratch ends?",
        ),
        baseline="softmax",
        rows=(*scratch, *tuned),
    )
