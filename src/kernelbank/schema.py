"""Dataclasses from JSON documents and back, strictly: an unknown, missing or mistyped field is an error. No torch."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> Any:
    """`value` for plain JSON: a float that is not finite becomes "nan", "inf" or "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: encode(inner) for key, inner in value.items()}
    return [encode(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def decode(kind: type[T], document: object, name: str, **given: Any) -> T:
    """The dataclass `kind` from a JSON object; `given` are fields that the document does not hold.

    Raises:
        ValueError: If the document is not an object, or a field is unknown, missing or of another type; the message
            names the field, as ``record.epochs[3].val_loss``.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"invalid {name}; expected a JSON object, got {type(document).__name__}")
    hints, names = get_type_hints(kind), [f.name for f in fields(kind) if f.name not in given]  # type: ignore[arg-type]
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in document if key not in names):
        raise ValueError(f"{name} has an unknown field {unknown[0]!r}")
    if missing := [field for field in needed if field not in document and field not in given]:
        raise ValueError(f"{name} lacks the field {missing[0]!r}")
    values = {key: _value(hints[key], document[key], f"{name}.{key}") for key in names if key in document}
    return kind(**values, **given)


def _value(kind: Any, value: Any, name: str) -> Any:
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        read = getattr(kind, "from_document", None)  # a class that reads its own documents
        return decode(kind, value, name) if read is None else read(value)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in inner or type(value) not in map(type, inner):
            raise ValueError(f"invalid {name}={value!r}; expected one of {', '.join(map(repr, inner))}")
        return value
    if origin is tuple and isinstance(value, list):
        return _items(inner, value, name)
    if _is_mapping(origin):
        if isinstance(value, Mapping):
            return dict(value)
    elif origin in (types.UnionType, Union):
        return None if value is None and type(None) in inner else _value(inner[0], value, name)
    elif kind is float:
        if isinstance(value, str) and value in _SPECIAL:
            return _SPECIAL[value]
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**1000:
            return float(value)
    if origin is None and type(value) is kind and not (kind is int and abs(value) >= 2**64):
        return value
    raise ValueError(f"invalid {name}={_shown(value)}; expected {getattr(kind, '__name__', kind)}")


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _items(kinds: tuple[Any, ...], value: list[Any], name: str) -> tuple[Any, ...]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"invalid {name}; expected {len(kinds)} values, got {len(value)}")
    return tuple(_value(k, item, f"{name}[{i}]") for i, (k, item) in enumerate(zip(kinds, value, strict=True)))


def _shown(value: Any) -> str:
    """The value, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
