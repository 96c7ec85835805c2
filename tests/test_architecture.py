"""The house: imports run one way, no method name is code, every public thing is documented."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kernelbank
from kernelbank.atlas import ROWS

ROOT = Path(kernelbank.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Lower layers first; a module imports its own layer's package or lower layers, never higher ones. The text of a
# spec names rows, so the rows (plain text) stand below the grammar that reads them.
LAYERS = [
    {"errors", "text", "schema"}, {"files", "memory", "terminal"}, {"atlas"}, {"spec"}, {"model"}, {"zoo"},
    {"records"}, {"ops"}, {"nn"},
    {"analysis", "data"}, {"models"}, {"weights", "testing"}, {"huggingface"}, {"train"}, {"studies"}, {"report"},
    {"explanation"}, {"exports"}, {"benchmark"},
    {"commands"}, {"cli"},
    {"__init__", "__main__"},
]  # fmt: skip
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TORCH_FREE = {
    "errors", "files", "memory", "terminal", "text", "schema", "atlas", "spec", "model", "zoo", "records", "cli",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, functions included, by full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def home(path: Path) -> str:
    """The first component of a file below the package: `ops`, `spec`, ..."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if home(path) == "__init__":
        return
    for name in imports(path):
        if name.startswith("kernelbank.") and (part := name.split(".")[1]) in RANK:
            assert RANK[part] < RANK[home(path)] or part == home(path), f"{home(path)} imports {name}"
        if name.split(".")[0] in ("torch", "timm"):
            assert home(path) not in TORCH_FREE, f"{home(path)} imports {name}"


@pytest.mark.parametrize("folder", ["ops"])
def test_the_operator_stands_on_torch_alone(folder: str) -> None:
    for path in [*(ROOT / folder).rglob("*.py"), ROOT / "nn" / "mixer.py"]:
        outside = {name.split(".")[0] for name in imports(path)} - {"kernelbank", "torch", "__future__"}
        assert not outside & {"timm", "torchvision", "numpy", "einops", "sklearn"}, f"{path.name}: {outside}"


@pytest.mark.parametrize("path", [*sorted((ROOT / "ops").glob("*.py")), ROOT / "nn" / "mixer.py"], ids=lambda p: p.name)
def test_no_method_is_code(path: Path) -> None:
    """A row's name may stand in prose, never in the operator's code."""
    plain = {"pool", "conv"}  # words of the axes and of torch
    tree = ast.parse(path.read_text())
    words = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)
    }
    docs = {
        ast.get_docstring(n, clean=False)
        for n in ast.walk(tree)
        if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))
    }
    words |= {
        n.value
        for n in ast.walk(tree)
        if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value not in docs
    }
    assert not words & (ROWS.keys() - plain)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_things_are_documented_and_typed(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
    for node in ast.walk(tree):  # pointers and tiles of Triton's kernels have no types in Python
        if isinstance(node, ast.FunctionDef) and "jit" not in {ast.unparse(d) for d in node.decorator_list}:
            missing = [
                a.arg
                for a in node.args.args + node.args.kwonlyargs
                if a.annotation is None and a.arg not in ("self", "cls")
            ]
            assert not missing and node.returns is not None, f"{path.name}: {node.name} is not typed"


def test_the_spec_package_imports_its_own_modules() -> None:
    """Inside `spec` names come from the module that defines them, so that the package may re-export all of them."""
    for path in sorted((ROOT / "spec").glob("*.py")):
        tree = ast.parse(path.read_text())
        packages = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert "kernelbank.spec" not in packages, path.name


PROJECT = ROOT.parents[1]
IDIOMS = (
    r"is not legal", r"; legal:", r"\b(one|a number|a kernel) an? (head|position|query|channel|image|cell|window)\b",
    r"\ba (number|kernel|table|weight|path|row) a (head|position|query|channel|image)\b", r"\bdesign \d",
    r"systems\.md", r"(?<!docs/)\bperformance\.md, section", r"record's text", r"\brecords? (as text|of a mixer)\b",
    r"\bimages a second\b", r"\bevery path says\b", r"\bthe fastest linears\b",
)  # fmt: skip
"""What no reader outside this project would understand, and references to documents that are not in the repository."""
PLAIN_FILES = (
    *FILES, *sorted((PROJECT / "benchmarks").glob("*.py")), *sorted((PROJECT / "docs").rglob("*.md")),
    PROJECT / "README.md", PROJECT / "CHANGELOG.md",
)  # fmt: skip


@pytest.mark.parametrize("path", PLAIN_FILES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_the_prose_is_plain(path: Path) -> None:
    text = path.read_text()
    assert not [match[0] for idiom in IDIOMS for match in re.finditer(idiom, text)]


def test_a_word_names_one_thing() -> None:
    """These words are the name of one class in the package."""
    words = {"Row", "Site", "Machine", "Line", "Group", "Rule", "Source", "Proof", "Verdict", "Spec", "Record"}
    names = [name for path in FILES for node in ast.parse(path.read_text()).body for name in defined(node)]
    assert not [word for word in words if names.count(word) > 1]


def defined(node: ast.stmt) -> list[str]:
    """The names of the class or the variables that a statement defines."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    return [t.id for t in node.targets if isinstance(t, ast.Name)] if isinstance(node, ast.Assign) else []


def test_nothing_unfinished_or_local_is_committed() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|(^|[\s\"'])/(work|root|tmp)/")
    for path in FILES:
        assert not marks.search(path.read_text()), path


def test_the_lazy_names_exist() -> None:
    assert all(getattr(kernelbank, name) is not None for name in kernelbank.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Mixr'"):
        kernelbank.Mixr  # noqa: B018
