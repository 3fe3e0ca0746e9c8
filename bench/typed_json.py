"""Dataclasses to JSON and back. An error names the entry of the file that does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from typing import Any, TypeVar

_T = TypeVar("_T")
_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def to_json(value: Any) -> Any:
    """The value as ``json.dumps`` takes it. A number that is not finite becomes null: JSON has no word for it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(kind: type[_T], value: Any, place: str = "") -> _T:
    """A value of the type ``kind``, a dataclass or a type of its fields, from the result of ``json.loads``.

    Fields that the JSON lacks take their defaults. Names that the dataclass lacks are ignored.

    Raises:
        ValueError: a value is of another type, or a field without a default is absent.
    """
    return typing.cast(_T, _read(kind, value, place))


def misfit(place: str, wanted: str, value: Any) -> ValueError:
    """The error for a value that is not what it must be."""
    return ValueError(f"{place or 'the file'} must be {wanted}, got {json.dumps(value):.60}")


def _read(kind: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, value, place)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _read(next(k for k in inner if k is not type(None)), value, place)
    if origin is list or origin is tuple:
        return _read_sequence(origin, inner, value, place)
    if origin is dict:
        if not isinstance(value, dict):
            raise misfit(place, "an object", value)
        return {name: _read(inner[1], item, f"{place}.{name}") for name, item in value.items()}
    if kind is Any:
        return value
    accepted = (int, float) if kind is float else (kind,)
    if type(value) not in accepted:  # bools are excluded
        raise misfit(place, _NAMES[kind], value)
    return value


def _read_sequence(origin: type, inner: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, list):
        raise misfit(place, "a list", value)
    kinds = inner
    if origin is list or inner[-1] is Ellipsis:
        kinds = (inner[0],) * len(value)
    if len(kinds) != len(value):
        raise misfit(place, f"a list of {len(kinds)}", value)
    return origin(_read(kind, item, f"{place}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _read_dataclass(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise misfit(place, "an object", value)
    hints, values = typing.get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        inner = f"{place}.{field.name}" if place else field.name
        if field.name in value:
            values[field.name] = _read(hints[field.name], value[field.name], inner)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            values[field.name] = _read(hints[field.name], None, inner)  # the error says what it must be
    return kind(**values)
