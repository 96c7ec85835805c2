"""Table 1 of the paper as an experiment: where kernels come from, in one host model."""

from __future__ import annotations

from kernelbank.studies.study import Study, StudyRow


def kernels() -> Study:
    """The methods of the table, and depth-wise kernels from every source, whatever else is the same.

    The methods are rows of the atlas, with windows, neighborhoods and mixtures of the size of the grid. The depth-wise
    rows stand in one frame (a conv for q, a projection out) at the published size of 7 x 7; their kernels are learned,
    generated for an image, generated at every position, mixed from learned prototypes, or taken from the bank of all
    positions, which has kernels of 1 x 1 and a relative position.
    """
    rows = (
        StudyRow("softmax", "ViT: the kernels of all positions, two steps with softmax between them", "vit"),
        StudyRow("softmax-relative", "the same with relative positions, as windows, neighborhoods and banks have",
                 "vit_relpos"),
        StudyRow("swin", "Swin: the kernels of shifted windows", "swin support={window}"),
        StudyRow("linformer", "Linformer: as many learned mixtures of the kernels as a quarter of the positions",
                 "linformer mix=project({quarter})"),
        StudyRow("nat", "NAT: the kernels of a neighborhood", "nat support=neighborhood({neighborhood})"),
        StudyRow("dconv", "D-Conv: full kernels of 3 x 3, one for each image, mixed from four learned ones", "dconv"),
        StudyRow("static", "one learned depth-wise kernel for all images and positions", "dwconv frame=linear"),
        StudyRow("image", "a depth-wise kernel generated for each image", "ddwconv frame=linear"),
        StudyRow("position", "a depth-wise kernel generated at every position, used only there",
                 "iddwconv kernel=depthwise frame=linear"),
        StudyRow("position-heads", "the same, shared by the channels of a head, as involution shares kernels",
                 "iddwconv kernel=grouped(host) frame=linear"),
        StudyRow("prototypes", "a depth-wise kernel for each image, mixed from eight learned ones",
                 "condconv_dw size=7 frame=linear"),
        StudyRow("bank", "depth-wise self-attention: the kernels of all positions, averaged, with relative positions",
                 "dwsa"),
        StudyRow("bank-window", "the same over the kernels of shifted windows", "dwsa_window support={window}"),
    )  # fmt: skip
    return Study(
        name="kernels",
        title="Where do the kernels come from?",
        questions=(
            "Static, per image, per position, or from a bank that positions share: what do depth-wise kernels gain?",
            "What does a way of selecting kernels cost in parameters, multiply-adds and time?",
        ),
        baseline="softmax",
        rows=rows,
    )
