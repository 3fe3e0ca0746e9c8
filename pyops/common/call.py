"""An operator's call as one typed object: a NamedTuple with a field for each argument of the schema, in its order.

    class Scale(NamedTuple):
        x: Tensor
        factor: float = 1.0

Check, reference, launchers in Python, fake function and cost take this object, so that an operator's arguments are
spelled out once. One field may be a NamedTuple itself: its fields are arguments, too, and several operators may share
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

_REQUIRED: Any = object()  # the default of an argument that has none

# what an argument of a type of the schema, as torch prints it, is in Python
_TYPES: dict[str, Any] = {
    "Tensor": Tensor,
    "List[Tensor]": Sequence[Tensor],
    "Optional[Tensor]": Tensor | None,
    "int": int,
    "List[int]": Sequence[int],
    "Optional[List[int]]": Sequence[int] | None,
    "Optional[int]": int | None,
    "float": float,
    "Optional[float]": float | None,
    "bool": bool,
    "str": str,
    "ScalarType": torch.dtype,
    "Optional[ScalarType]": torch.dtype | None,
    "Optional[Device]": torch.device | None,
}


class Argument(NamedTuple):
    name: str
    type: Any
    default: Any


def arguments(call: Any) -> tuple[Argument, ...]:
    """The arguments that a call is made from."""
    found: list[Argument] = []
    for name, kind in get_type_hints(call).items():
        part = hasattr(kind, "_fields")
        found += arguments(kind) if part else [Argument(name, kind, call._field_defaults.get(name, _REQUIRED))]
    return tuple(found)


def maker(call: Any) -> Callable[..., Any]:
    """Makes a call from the operator's positional arguments."""
    part = next(((i, kind) for i, kind in enumerate(get_type_hints(call).values()) if hasattr(kind, "_fields")), None)
    if part is None:
        return call
    first, inner = part[0], maker(part[1])
    end = first + len(arguments(part[1]))
    return lambda *args: call(*args[:first], inner(*args[first:end]), *args[end:])


def flat(call: Any) -> tuple[Any, ...]:
    """The operator's positional arguments."""
    found: list[Any] = []
    for value in call:
        found += flat(value) if hasattr(value, "_fields") else (value,)
    return tuple(found)


def check_schema(op: str, call: Any, schema: torch.FunctionSchema) -> None:
    """Refuse a call whose fields are not the schema's arguments by name, order, type and default."""
    wanted = [
        Argument(a.name, _TYPES.get(str(a.real_type)), a.default_value if a.has_default_value() else _REQUIRED)
        for a in schema.arguments
    ]
    seen = list(arguments(call))
    for n in range(max(len(wanted), len(seen))):
        ours, theirs = seen[n] if n < len(seen) else None, wanted[n] if n < len(wanted) else None
        if ours != theirs:
            raise ValueError(
                f"register: {op}: argument {n} of the schema is {_show(theirs)}, but {call.__name__} has {_show(ours)}"
            )


def _show(argument: Argument | None) -> str:
    if argument is None:
        return "absent"
    default = "" if argument.default is _REQUIRED else f" = {argument.default!r}"
    return f"{argument.name}: {getattr(argument.type, '__name__', argument.type)}{default}"
