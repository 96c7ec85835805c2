"""Export a model with another mixer to ONNX, and classify a photograph with onnxruntime and numpy alone.

    python examples/serve.py [FOLDER]

The preprocessing is read from the file's metadata, where `kernelbank export` writes it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import timm
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

import kernelbank


def classify(file: Path, picture: Image.Image) -> list[tuple[str, float]]:
    """Return the names and outputs of the five highest classes."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["kernelbank"])["preprocessing"]
    _, height, width = about["input_size"]
    method = Image.Resampling[about["interpolation"].upper()]
    fitted = ImageOps.fit(picture, (width, height), method, bleed=(1 - about["crop_pct"]) / 2)
    pixels = np.asarray(fitted) / 255 * about["white"]
    images = ((pixels - about["mean"]) / about["std"]).transpose(2, 0, 1)[None].astype(np.float32)
    (outputs,) = session.run(["outputs"], {"images": images})
    return [(about["class_names"][index], float(outputs[0, index])) for index in np.argsort(-outputs[0])[:5]]


def main(folder: str) -> None:
    """Write model.onnx into `folder` and print what it says about a flower."""
    model = timm.create_model("test_vit").eval()  # pretrained=True for weights that know flowers
    kernelbank.replace_mixers(model, "activation=relu,count")
    file = Path(folder) / "model.onnx"
    report = kernelbank.export(model, file, overwrite=True)
    print(f"{file.name}: within {report.difference:.1e} of the model")
    for name, output in classify(file, Image.fromarray(load_sample_image("flower.jpg"))):
        print(f"{output:8.3f} {name}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(*(sys.argv[1:] or [temporary]))
