"""The command line: its verbs and options, one line and exit code 2 for bad input, fast and without torch."""

import io
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import kernelbank
from kernelbank import cli
from kernelbank.analysis.proofs import ProofResult
from kernelbank.atlas import ROWS
from kernelbank.commands.atlas import Options
from kernelbank.commands.fields import options_of
from kernelbank.commands.help import EXAMPLES, SECTIONS
from kernelbank.text import one_line, printable
from kernelbank.zoo import MODELS

GOLDEN = Path(__file__).parent / "golden" / "cli.txt"
Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def process(*argv: str, **options: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *argv]
    environment = {**os.environ, "PYTHONPATH": str(Path(kernelbank.__file__).parents[1]), "PYTHONWARNINGS": "error"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)  # type: ignore[call-overload,no-any-return]


def helped(capsys: Capture, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_verbs_and_options_are_the_golden_ones(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a wanted change: ``UPDATE_GOLDEN=1 pytest tests/test_cli.py`` writes the file anew."""
    monkeypatch.setenv("COLUMNS", "100")
    _, listed, _ = run(capsys, "--help")
    text = f"$ kernelbank --help\n{listed}"
    for verb in cli.VERBS:
        text += f"\n$ kernelbank {verb} --help\n{helped(capsys, verb)}"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def options_read(verb: str) -> set[str]:
    """The options of the dataclass that the verb reads, as words of flags."""
    kind = get_type_hints(import_module(f"kernelbank.commands.{verb}").read)["return"]
    kind = kind if is_dataclass(kind) else get_args(kind)[0]
    return {option.name.replace("_", "-") for option in options_of(kind) if not option.positional}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_is_in_one_section_of_the_help(capsys: Capture, verb: str) -> None:
    paragraphs = helped(capsys, verb).rstrip().split("\n\n")
    shown = re.findall(r"^  --(?:no-)?([a-z0-9-]+)", "\n".join(paragraphs), re.MULTILINE)
    assert len(set(shown)) == len(shown) and set(shown) == options_read(verb)
    assert [name.replace("_", "-") for names in SECTIONS[verb].values() for name in names.split()] == shown
    assert paragraphs[0].startswith(f"usage: kernelbank {verb} ") and paragraphs[-1].startswith("examples:\n")


def test_the_examples_of_the_help_can_be_read() -> None:
    """Their words are parsed and checked as the verb does before it runs."""
    assert EXAMPLES.keys() == cli.VERBS.keys() and len(cli.EXAMPLES) == 2
    examples = [(verb, command) for verb, pair in EXAMPLES.items() for command, _ in pair]
    assert len(examples) == 2 * len(cli.VERBS)
    for verb, command in [*examples, *((command.split()[1], command) for command in cli.EXAMPLES)]:
        program, named, *words = shlex.split(command)
        assert (program, named) == ("kernelbank", verb)
        import_module(f"kernelbank.commands.{verb}").read(words)


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
@pytest.mark.parametrize("verb", ["train", "benchmark"])
def test_the_help_fits_the_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch, verb: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    described = [line for line in helped(capsys, verb).splitlines() if line.startswith(" " * 26)]
    assert max(map(len, described)) <= min(columns, 120) and len(described) > 2


def test_the_help_states_the_defaults_of_the_recipe_that_is_named(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    line = "  --epochs INT            The number of passes over the training images. (default: {})\n"
    assert line.format(300) in helped(capsys, "train")
    assert line.format(12) in helped(capsys, "train", "--recipe", "digits")


def test_every_verb_is_in_one_section() -> None:
    assert sorted(verb for verbs in cli.SECTIONS.values() for verb in verbs) == sorted(cli.VERBS)


def test_every_verb_has_a_function_and_a_line() -> None:
    for verb, (target, line) in cli.VERBS.items():
        assert verb.islower() and ":" in target and len(line) < 100


def test_help_and_version(capsys: Capture) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {verb}" in out for verb in cli.VERBS)
    assert run(capsys) == (2, out, "")
    assert run(capsys, "--version") == (0, f"kernelbank {kernelbank.__version__}\n", "")


# ---- atlas -----------------------------------------------------------------------------------------------


def test_atlas_models_prints_every_registered_model_beside_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "atlas", "--models")
    assert (code, err) == (0, "") and all(name in out for name in MODELS)
    (line,) = (line for line in out.splitlines() if line.startswith("vit_kb_small_patch16_224"))
    assert "22,050,664" in line and "4.599 G" in line and "4.241 G" in line and "DeiT-S: 22.05 M, 4.61 G" in line
    models = json.loads(run(capsys, "atlas", "--models", "--json")[1])
    assert [model["model"] for model in models] == list(MODELS)
    assert all(model["parameter_bytes"] == 4 * model["params"] for model in models)
    assert run(capsys, "atlas", "vit", "--models")[0] == 2


def test_the_table_is_whole_when_piped(capsys: Capture) -> None:
    code, out, err = run(capsys, "atlas")
    assert code == 0 and not err and "…" not in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for name, row in ROWS.items():
        shown = lines[name]
        for field, text in row.cells.items():
            assert field == "bias" or ("-" if text == "none" else text.replace(" tau=1,", "")) in shown


@pytest.mark.parametrize("columns", [80, 100, 120, 160])
def test_the_table_fits_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["atlas"]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert max(map(len, shown.splitlines())) <= columns
    widest = ["window(7, alternate)", "softmax@positions,l1", "predict(softmax, r=4)", "dynamic(16, sigmoid)"]
    for cell in [*ROWS, *widest]:
        assert cell in shown


def test_all_rows_as_json(capsys: Capture) -> None:
    code, out, _ = run(capsys, "atlas", "--json")
    assert code == 0 and [row["row"] for row in json.loads(out)] == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_one_spec_as_json(capsys: Capture, row: str) -> None:
    code, out, err = run(capsys, "atlas", row, "--json", "--prefix", "1")
    assert (code, err) == (0, "") and json.loads(out)["spec"] == row


@pytest.mark.parametrize("words", [["vit", "kernel=depthwise", "mix=mean"], ["vit kernel=depthwise mix=mean"]])
def test_one_spec_as_words_or_quoted(capsys: Capture, words: list[str]) -> None:
    code, out, _ = run(capsys, "atlas", *words, "--dim", "64", "--heads", "4", "--grid", "7", "5")
    assert code == 0 and out.startswith("dwsa position=none\n")
    assert "activation: softmax → none" in out and "35 × 64" in out and "o_i = q_i ⊙ mean_j k_j" in out


def test_figure(capsys: Capture, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "atlas", "se", "--json", "--figure", str(tmp_path / "se.svg"))
    assert code == 0 and json.loads(out) and (tmp_path / "se.svg").exists()


def test_a_figure_without_matplotlib_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = "kernelbank: error: --figure needs matplotlib: pip install 'kernelbank[report]'\n"
    assert run(capsys, "atlas", "vit", "--figure", "x.svg") == (2, "", said)


BAD = [
    (["atlsa"], "unknown verb 'atlsa'; did you mean 'atlas'?; expected one of atlas, "),
    (["atlas", "vti"], "did you mean 'vit'?"),
    (["atlas", "vit", "kernle=full"], "did you mean 'kernel'?"),
    (["atlas", "vit", "kernel=full"], "invalid kernel=full: "),
    (["atlas", "kernel=full"], "it has cells only"),
    (["atlas", ""], "invalid spec ''"),
    (["atlas", "vit", "--heads", "5"], "invalid dim=384; expected a multiple of 5, the number of heads"),
    (["atlas", "vit", "--grid", "0", "4"], "invalid grid height=0"),
    (["atlas", "vit", "--grid", "14"], "--grid"),
    (["atlas", "vit", "--grid", "a", "b"], "--grid"),
    (["atlas", "vit", "--prefix", "-1"], "invalid prefix=-1"),
    (["atlas", "vit", "--dim", "0"], "invalid dim=0"),
    (["atlas", "vit", "--dim", "wide"], "invalid --dim 'wide'; expected a whole number"),
    (["atlas", "--json=true"], "invalid --json=true; expected --json without a value"),
    (["atlas", "--help=3"], "invalid --help=3; expected --help as --help shows it"),
    (["atlas", "--spec"], "--spec: expected a value"),
    (["atlas", "vit", "--spec", "se"], "--spec is given twice, by name and as 'vit'"),
    (["convert", "--dst", "x.safetensors"], "SRC is missing"),
    (["convert", "a", "--dst", "x", "--dst", "y"], "--dst is given twice"),
    (["train", "--modle", "x"], "unknown option --modle; did you mean '--model'?"),
    (["atlas", "vit", "--dim"], "--dim"),
    (["atlas", "vit", "--dimm", "3"], "unknown option --dimm; did you mean '--dim'?"),
    (["atlas", "vit", "--grid", "3", "3", "mix=mean"], "mix=mean"),
    (["atlas", "--dim", "64"], "--dim belongs to one spec"),
    (["atlas", "--figure", "x.svg"], "--figure draws one spec"),
    (["atlas", "vit", "--figure", "x.gif"], ".svg, .png or .pdf"),
    (["atlas", "vit", "--figure", "/nowhere/x.svg"], "it cannot be written"),
    (["atlas", "vit", "--prove"], "expected no spec"),
]


@pytest.mark.parametrize(("argv", "said"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_exit_code_2(capsys: Capture, argv: list[str], said: str) -> None:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("kernelbank") and ": error: " in err and said in err and err.count("\n") == 1


def test_an_error_line_is_printable_and_of_a_sensible_length(capsys: Capture) -> None:
    code, out, err = run(capsys, "atlas", "vit", "--figure", "a\x1b[31m\u202e\udcff.gif")
    assert (code, out) == (2, "") and r"a\x1b[31m\u202e\udcff.gif" in err and err.strip().isprintable()
    for argv in (["x" * 10_000], ["atlas", "vit " + "y" * 10_000], ["atlas", "--" + "z" * 10_000]):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and len(err) == 501 and err.endswith("...\n")


def test_printable_escapes_only_what_a_terminal_would_act_on() -> None:
    assert printable("naïve 日本 × name.png") == "naïve 日本 × name.png"
    assert printable("a\nb\tc\x1b]0;title\x07\x85\u2028") == r"a\nb\tc\x1b]0;title\x07\x85\u2028"
    assert one_line("a\n  b") == "a b" and one_line("c" * 20, 10) == "c" * 7 + "..."


@pytest.mark.parametrize(
    ("by_place", "by_name"),
    [
        (["atlas", "se", "--json"], ["atlas", "--spec", "se", "--json"]),
        (["atlas", "se", "--json"], ["atlas", "--json", "--spec=se"]),
        (["atlas", "vit", "size=3", "--dim", "48"], ["atlas", "--dim", "48", "--spec", "vit", "size=3"]),
        (["convert", "a", "b"], ["convert", "--src", "a", "--dst", "b"]),
        (["convert", "a", "b"], ["convert", "--dst", "b", "--src", "a"]),
        (["convert", "a", "b"], ["convert", "a", "--dst", "b"]),
        (["convert", "a", "b"], ["convert", "b", "--src", "a"]),
    ],
)
def test_positional_arguments_may_be_named(capsys: Capture, by_place: list[str], by_name: list[str]) -> None:
    assert run(capsys, *by_place) == run(capsys, *by_name)


POSITIONAL = {
    "atlas": ["--spec"], "convert": ["--src", "--dst"], "benchmark": ["--subject"], "study": ["--study"],
    "train": ["--model"], "evaluate": ["--model"], "compare": ["--runs"],
}  # fmt: skip


@pytest.mark.parametrize(("verb", "flag"), [(verb, flag) for verb in POSITIONAL for flag in POSITIONAL[verb]])
def test_every_positional_argument_has_a_name(capsys: Capture, verb: str, flag: str) -> None:
    """An option that exists is never answered as unknown, and so never suggested as itself."""
    code, _, err = run(capsys, verb, flag)
    assert (code, err) == (2, f"kernelbank {verb}: error: {flag}: expected a value\n")


@pytest.mark.parametrize("argv", [["--debug", "atlas", "vti"], ["atlas", "vti", "--debug"]])
def test_debug_shows_the_traceback(argv: list[str]) -> None:
    with pytest.raises(kernelbank.SpecError):
        cli.main(argv)


# ---- proofs ----------------------------------------------------------------------------------------------


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    errors = {"one": 0.0, "two": 1e-12}
    monkeypatch.setattr("kernelbank.analysis.prove.PROOFS", errors)
    monkeypatch.setattr("kernelbank.analysis.prove.prove", lambda name: ProofResult(name, "a = b", errors[name]))
    return errors


def test_proofs_that_hold(capsys: Capture, proofs: dict[str, float]) -> None:
    code, out, _ = run(capsys, "atlas", "--prove")
    assert code == 0 and out.count("holds") == 2 and "2 of 2 hold" in out and "1.0e-12" in out


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_proof_that_fails_is_exit_code_1(capsys: Capture, proofs: dict[str, float], error: float) -> None:
    proofs["two"] = error
    code, out, _ = run(capsys, "atlas", "--prove")
    assert code == 1 and "fails" in out and "1 of 2 hold" in out
    code, out, _ = run(capsys, "atlas", "--prove", "--json")
    assert code == 1 and [proof["holds"] for proof in json.loads(out)] == [True, False]


# ---- the process -----------------------------------------------------------------------------------------


def test_interruption_is_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("kernelbank.commands.atlas.main", interrupt)
    assert run(capsys, "atlas") == (130, "", "kernelbank: interrupted\n")


def test_a_closed_pipe_is_silent() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(Path(kernelbank.__file__).parents[1])}
    command = [sys.executable, "-m", "kernelbank", "atlas", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/full", 2, "kernelbank: error: No space left on device\n"),
        ("| true; exit ${PIPESTATUS[0]}", 141, ""),
    ],
)
@pytest.mark.parametrize("verb", ["--help", "atlas", "atlas --json"])
def test_an_output_that_takes_nothing(verb: str, redirected: str, code: int, said: str) -> None:
    script = f"{sys.executable} -m kernelbank {verb} {redirected}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False,
                          env={**os.environ, "PYTHONPATH": str(Path(kernelbank.__file__).parents[1])})  # fmt: skip
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("argv", [["--help"], ["atlas"], ["atlas", "vit"]], ids=" ".join)
def test_start_is_fast(argv: list[str]) -> None:
    def seconds() -> float:
        """Of processor time: a start is one thread of Python, and the wall clock also measures the neighbours."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("-m", "kernelbank", *argv).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_atlas_imports_neither_torch_nor_matplotlib() -> None:
    program = "import sys; from kernelbank.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for argv in (["atlas"], ["atlas", "vit"], ["atlas", "vit", "--json"]):
        loaded = process("-c", program, *argv).stderr.split()
        assert not {"torch", "matplotlib", "numpy"} & set(loaded)
    program += "; assert 'tyro' not in sys.modules and 'rich' not in sys.modules"
    assert process("-c", program, "--help").returncode == 0


def test_options_have_help() -> None:
    assert Options.__doc__ and Options().grid == (14, 14)
