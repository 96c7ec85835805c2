"""The figure of every row: drawn without pyplot, whole or not at all."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from kernelbank.analysis.equation import equation
from kernelbank.analysis.figure import draw, mathtext, picture
from kernelbank.atlas import ROWS
from kernelbank.errors import InputError
from kernelbank.spec import MixerSpec, SpecError

OTHERS = [
    "strided_bank bank=dynamic(stride=3)", "conv kernel=full(4)", "dwsa support=self", "pool size=7",
    "dwsa_window mix=pool", "external_attention activation=sqrt_count,scale(0.5)", "dwsa support=neighborhood(3)",
    "ddwconv bank=dynamic(4, tanh) support=window(5, 2)", "dconv bank=static(12) mix=predict(sigmoid, 2)",
    "swin activation=log_count,gelu,layernorm@positions,center,l2,count@positions,softmax(3)",
]  # fmt: skip


@pytest.mark.parametrize("text", [*ROWS, *OTHERS])
def test_every_spec_is_drawn(text: str) -> None:
    figure = picture(MixerSpec.parse(text), 64, 4, (9, 20), 2)
    figure.draw_without_rendering()
    assert len(figure.axes) == 3


MAGIC = [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF"), ("SVG", b"<?xml")]


@pytest.mark.parametrize(("suffix", "magic"), MAGIC)
def test_the_suffix_decides(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"out.{suffix}"
    draw(MixerSpec.parse("vit"), 64, 4, (4, 4), 0, path)
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_spec_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(MixerSpec.parse("swin"), 64, 4, (8, 8), 1, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("name", ["out.gif", "out", "missing/out.svg", "folder.svg"])
def test_a_bad_path_is_one_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(InputError, match=r"^invalid figure=.*(out|folder)"):
        draw(MixerSpec.parse("vit"), 64, 4, (4, 4), 0, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


def test_an_invalid_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        draw(MixerSpec.parse("vit"), 64, 5, (4, 4), 0, tmp_path / "out.svg")
    assert not list(tmp_path.iterdir())


def test_mathtext() -> None:
    assert mathtext(equation(MixerSpec.parse("vit_relpos"))) == (
        r"$o_{i}\,=\,\sum_{j}\,\mathrm{softmax}_{j}(q_{i}\,k_{j}^T\,/\,\sqrt{d}\,+\,p_{ij})\,v_{j}$"
    )
