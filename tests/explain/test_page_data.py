"""What the page's JavaScript reads from its data are the maps and kernels of `explain`, up to their 8 bits."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from equality import build, draw
from pages import column, noise, render, texts
from strategies import Host
from tiny_models import drawn

import kernelbank.models
from kernelbank.atlas import ROWS
from kernelbank.explanation import page
from kernelbank.explanation.layer import LayerMaps
from kernelbank.explanation.page import MOST_WEIGHTS, Column, map_size
from kernelbank.explanation.statistics import head_taps
from kernelbank.spec import MixerSpec

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="needs Node.js, which runs the page's JavaScript")
READER = """
const texts = JSON.parse(require("fs").readFileSync(0, "utf8"));
globalThis.document = { getElementById: (id) => ({ textContent: texts[id] }) };
const source = require("fs").readFileSync(process.argv[1], "utf8");
new Function("done", source + `
  (async () => {
    const found = [];
    for (const model of DATA.models) for (const layer of model.layers) for (const image of layer.images) {
      const parts = { ...(layer.shared ? await load(layer.shared) : {}), ...(await load(image.blob)) };
      const view = new View({ ...layer, ...image.meta }, parts);
      const rows = [];
      for (let token = 0; token < view.tokens; token++) for (let head = 0; head < layer.heads; head++) {
        const row = { token, head };
        if (layer.kind === "kernel") row.kernel = view.kernel(head, token);
        for (const part of ["effective", "dynamic", "static"]) {
          const there = layer.kind !== "kernel" || (part === "static" && layer.table);
          row[part] = there ? view.weights(part, head, token) : null;
        }
        for (const key in row) if (row[key]?.length) row[key] = Array.from(row[key], (v) => (v !== v ? null : v));
        rows.push(row);
      }
      found.push({ name: layer.name, kind: layer.kind, rows });
    }
    done(JSON.stringify(found));
  })();
`)((text) => process.stdout.write(text));
"""


def read(*columns: Column) -> list[dict[str, Any]]:
    """The weights of every layer, head and position as the page's own code gives them."""
    assert NODE is not None
    script = files("kernelbank.explanation") / "assets" / "data.js"
    done = subprocess.run([NODE, "-e", READER, str(script)], input=json.dumps(texts(render("t", columns))), text=True,
                          capture_output=True, check=True, timeout=120)  # fmt: skip
    assert not done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def dense(layer: LayerMaps, values: torch.Tensor, position: int) -> list[float]:
    """Weights of a position by the token of each kernel, NaN where it sees none; by number for static banks."""
    if layer.origin is None:
        return [float(value) for value in values]
    tokens = layer.tokens[0 if layer.index is None else position].tolist()
    places = sorted({token for token in layer.origin.values.tolist() if token >= 0})
    by_token = {token: float(value) for token, value in zip(tokens, values, strict=True) if token >= 0}
    return [by_token.get(token, math.nan) for token in places]


def check(layer: LayerMaps, found: dict[str, Any]) -> None:
    parts = {"effective": layer.effective, "dynamic": layer.dynamic, "static": layer.static}
    for row in found["rows"]:
        head, token = row["head"], row["token"]
        for name, part in parts.items():
            if row.get(name) is None:
                continue
            assert part is not None
            values = part.values[head, token] if name == "static" else part.values[0, head, token]
            expected = dense(layer, values, token)
            assert [value is None for value in row[name]] == [math.isnan(value) for value in expected]
            bits = 127 if layer.static is None else 127 / 2  # two rounded terms
            size = max(abs(value) for value in expected if not math.isnan(value))
            if layer.table is not None:
                size = max(size, float(layer.table.values[head].abs().max()))
            for ours, theirs in zip(row[name], expected, strict=True):
                assert ours is None or abs(ours - theirs) <= 0.51 * size / bits + 1e-6, (layer.name, name)
        if "kernel" in row:
            taps = head_taps(layer)[0]
            expected_taps = taps[token if len(taps) > 1 else 0, layer.heads[head]]
            assert torch.allclose(torch.tensor(row["kernel"]).double(), expected_taps.double(),
                                  atol=float(expected_taps.abs().max()) / 127 * 0.51 + 1e-9)  # fmt: skip


HOSTS = [Host(32, 4, (5, 6), 1, 1), Host(32, 2, (6, 4), 0, 1)]
OTHERS = ["swin support=window(3, shift=1)", "swin support=window(4, shift=2, pad=timm)", "nat support=neighborhood(3)",
          "swin support=window(4, shift=2, pad=mmpretrain)", "vit_relpos activation=relu,count", "layernorm_attention",
          "dwsa support=window(3, shift=1)", "vit bank=dynamic(stride=4)", "involution kernel=grouped(4)",
          "linformer mix=project(5)"]  # fmt: skip


@needs_node
@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_every_row_of_the_atlas(host: Host) -> None:
    layers, columns = [], []
    for text in [*ROWS, *OTHERS]:
        mixer = build(MixerSpec.parse(text).at_block(1), host).eval()
        one = column(mixer, draw(mixer, 1)[0], label=text)
        columns.append(one)
        layers.append(one.shown[0].layers[0])
    for text, layer, found in zip([*ROWS, *OTHERS], layers, read(*columns), strict=True):
        kernel_alone = found["kind"] == "kernel"
        assert kernel_alone == ("kernel" in found["rows"][0]), text
        check(layer, found)


@needs_node
def test_models_pictures_and_heads_that_were_asked_for() -> None:
    model = drawn(timm.create_model("swin_kb_test_patch4_window7_64"), 0.05)
    one = column(model, noise(1, 3, 64, 64), noise(1, 3, 64, 64, seed=4), layers=[1, 4], heads=[1])
    found = read(one)
    assert [layer["name"] for layer in found] == ["layers.1.blocks.0.attn"] * 2 + ["layers.3.blocks.0.attn"] * 2
    for index, layer in enumerate(found):
        check(one.shown[index % 2].layers[index // 2], layer)


@needs_node
def test_a_large_page_has_no_scores_and_coarser_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build(MixerSpec.parse("vit_relpos"), HOSTS[1]).eval()
    one = column(mixer, draw(mixer, 1)[0])
    (whole,) = read(one)
    assert whole["rows"][0]["dynamic"] is not None
    monkeypatch.setattr(page, "LARGEST_MAPS", 100)
    monkeypatch.setattr(page, "LARGEST_LAYER", 100)
    (coarse,) = read(one)
    assert all(row["dynamic"] is None and row["static"] is not None for row in coarse["rows"])
    (layer,) = one.shown[0].layers
    assert layer.weights is not None
    for row in coarse["rows"]:
        expected = layer.weights.values[0, row["head"], row["token"]]
        error = (torch.tensor(row["effective"]).double() - expected).abs().max()
        assert float(error) <= 0.51 * float(expected.max()) / 31
        if row["token"] == 0 and row["head"] == 0:
            assert float(error) > 0.51 * float(expected.max()) / 255


@pytest.mark.parametrize("text", [*ROWS, *OTHERS])
def test_the_size_of_a_map_is_known_from_one_position(text: str) -> None:
    mixer = build(MixerSpec.parse(text).at_block(1), HOSTS[0]).eval()
    x = draw(mixer, 1)[0]
    part, whole = (kernelbank.explain(mixer, x, positions=asked)[0] for asked in ([0], None))
    assert map_size(part) == map_size(whole) < MOST_WEIGHTS
    if whole.scores is not None and whole.effective is not None and whole.geometry.layout is None:
        seen = whole.effective.values[0].numel()
        if whole.index is not None and whole.origin is not None:
            seen = len(whole.heads) * int((whole.tokens >= 0).sum())
        assert map_size(whole) == seen


def test_names_cannot_break_out_of_the_page() -> None:
    mixer = build(MixerSpec.parse("vit"), HOSTS[1]).eval()
    one = column(mixer, draw(mixer, 1)[0], label="</script><img src=x onerror=alert(1)>")
    html = render("<title>", [one])
    assert "<img" not in html and "<b>class" not in html and html.count("</script>") == html.count("<script")
    assert json.loads(texts(html)["data"])["models"][0]["images"][0]["classes"][0] == ["first <b>class</b>", 0.75]


def test_a_page_names_no_address() -> None:
    mixer = build(MixerSpec.parse("vit"), HOSTS[1]).eval()
    html = render("t", [column(mixer, draw(mixer, 1)[0])])
    assert "http:" not in html and "https:" not in html and "default-src 'none'" in html
    for name in ("data.js", "draw.js", "panel.js", "page.js"):
        script = (Path(page.__file__).parent / "assets" / name).read_text()
        assert "fetch(" not in script and "XMLHttpRequest" not in script and len(script.splitlines()) <= 400
