"""A dialect: the names that a library gives to the tensors of a family, and how its model is built and run."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kernelbank.errors import InputError
from kernelbank.model import ModelSpec
from kernelbank.weights.file import write_state
from kernelbank.weights.infer import Family
from kernelbank.weights.keymap import KeyMap, Pattern, Shapes, State
from kernelbank.weights.stock import Padding

Derivation = Callable[[str, ModelSpec], State]
"""A function that computes the buffers whose keys match a pattern from the description of the model."""
Run = Callable[[Tensor], Tensor]
"""A function from images (B, C, H, W) to logits, or to the features of a model without a head, (B, n)."""


class MissingLibraryError(Exception):
    """A library that is not installed, or that cannot be imported or build the model. The message states what to
    install."""


def load_strictly(model: nn.Module, state: State) -> nn.Module:
    """Load `state` into `model` and return it. Raises InputError for a tensor that is missing, left over or of another
    shape."""
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(f"the library refuses the tensors: {one_line(error)}") from None
    return model


def call_plainly(model: nn.Module, images: Tensor) -> Tensor:
    """Return the output of a model whose only input is the images."""
    output: Tensor = model(images)
    return output


def write_plainly(path: Path, state: State, spec: ModelSpec, source: str) -> None:
    """Write the tensors without a description of the model, which files of other libraries do not contain."""
    write_state(path, state, {"source": source})


@dataclass(frozen=True, kw_only=True)
class Library:
    """The library of a dialect. `build` builds a model, `load` loads a state dict, `call` runs the model, and `write`
    writes a file. `install` states how to install the library, and `holds_specs` whether its files can contain any
    mixer."""

    install: str
    build: Callable[[ModelSpec, Dialect], nn.Module]
    call: Callable[[nn.Module, Tensor], Tensor] = call_plainly
    load: Callable[[nn.Module, State], nn.Module] = load_strictly
    write: Callable[[Path, State, ModelSpec, str], None] = write_plainly
    holds_specs: bool = False


def _no_shapes(spec: ModelSpec) -> Shapes | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The names that a library gives to the tensors of a family.

    Its states always have the keys `marks` and never the keys `unmarked`. `derived` are the buffers, by the pattern of
    their keys, that are computed when a state is written. `pad` is the padding of windows that the grid does not fill
    (see `spec.axes.Window`), or None if the description states it. `shapes` returns the shapes of the tensors, if a
    conversion of tensors needs them. `trunk` are the fields of the trunk that all of its models have.
    """

    name: str
    family: Family
    library: Library
    keys: KeyMap
    marks: tuple[str, ...]
    unmarked: tuple[str, ...] = ()
    derived: Mapping[str, Derivation] = field(default_factory=dict)
    pad: Padding | None = None
    shapes: Callable[[ModelSpec], Shapes | None] = _no_shapes
    trunk: Mapping[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The name of the library, which is that of the dialect up to the suffix for the head."""
        return self.name.partition("-")[0]

    @property
    def bare(self) -> bool:
        """Whether its models have no head."""
        return self.name.endswith("-bare")

    def check_trunk(self, spec: ModelSpec) -> None:
        """Raise InputError, naming the field, unless the trunk of `spec` is as those of the library."""
        for name, value in self.trunk.items():
            if (found := getattr(spec.trunk, name)) != value:
                raise InputError(f"invalid {name}={found!r}; expected {value!r}, as all of its models have")

    def buffers(self, spec: ModelSpec) -> State:
        """Return the derived buffers of a model."""
        state = State()
        for pattern, derive in self.derived.items():
            state |= derive(pattern, spec)
        return state

    def is_derived(self, key: str) -> bool:
        """Whether `key` names a derived buffer."""
        return any(Pattern(pattern).match(key) is not None for pattern in self.derived)

    def matches(self, keys: Collection[str]) -> bool:
        """Whether `keys` are of this dialect."""
        return all(mark in keys for mark in self.marks) and not any(mark in keys for mark in self.unmarked)

    def model(self, spec: ModelSpec, state: State) -> Run:
        """Return the model of the library with the weights of `state`, in eval mode and float32, as a function.

        Raises:
            MissingLibraryError: If the library is missing.
            InputError: If the library refuses the state.
        """
        library = self.library
        wide = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        try:
            with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # other libraries warn about themselves
                model = library.load(library.build(spec, self), wide)
        except (ImportError, AssertionError) as error:
            raise MissingLibraryError(f"{library.install} ({one_line(error)})") from None
        model.eval()
        return lambda images: library.call(model, images)


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def need(module: str) -> None:
    """Raise ImportError unless `module` is installed."""
    if find_spec(module) is None:
        raise ImportError(f"no module {module}")
