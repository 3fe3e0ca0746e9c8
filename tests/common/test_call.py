"""A call has the arguments of its operator's schema, and is made from them and taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from leanops import _registry
from leanops.common import call as calls

SPECS = list(_registry.specs())


class Rest(NamedTuple):
    scale: float = 1.0
    ids: Sequence[int] | None = None


class Whole(NamedTuple):
    """Its last field holds the last two arguments."""

    x: Tensor
    rest: Rest


class Between(NamedTuple):
    """Its second field holds the second and the third argument."""

    x: Tensor
    rest: Rest
    y: Tensor | None = None


class Plain(NamedTuple):
    x: Tensor
    n: int
    name: str = "sum"


def check(call: type, schema: str) -> None:
    calls.check_schema("op", call, torch._C.parse_schema(f"test::op{schema}"))


def test_a_call_is_made_from_positional_arguments_and_taken_apart_again():
    make = calls.maker(Whole)
    assert make("x") == Whole("x", Rest(1.0, None))
    assert make("x", 2.0, [3]) == Whole("x", Rest(2.0, [3]))
    assert calls.flat(make("x", 2.0, [3])) == ("x", 2.0, [3])
    assert [a.name for a in calls.arguments(Whole)] == ["x", "scale", "ids"]
    make = calls.maker(Between)
    assert make("x", 2.0) == Between("x", Rest(2.0, None), None)
    assert make("x", 2.0, [3], "y") == Between("x", Rest(2.0, [3]), "y")
    assert calls.flat(make("x", 2.0, [3], "y")) == ("x", 2.0, [3], "y")
    assert [a.name for a in calls.arguments(Between)] == ["x", "scale", "ids", "y"]
    assert calls.maker(Plain) is Plain


@pytest.mark.parametrize(
    ("call", "schema"),
    [
        (Whole, "(Tensor x, float scale=1.0, int[]? ids=None) -> ()"),
        (Whole, "(Tensor(a!) x, float scale=1.0, SymInt[]? ids=None) -> ()"),
        (Between, "(Tensor x, float scale=1.0, int[]? ids=None, Tensor? y=None) -> ()"),
        (Plain, "(Tensor x, SymInt n, str name='sum') -> Tensor"),
    ],
)
def test_a_call_of_the_schema_is_taken(call, schema):
    check(call, schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("(Tensor y, int n, str name='sum') -> ()", "argument 0 of the schema is y: Tensor, but Plain has x: Tensor"),
        ("(int n, Tensor x, str name='sum') -> ()", "argument 0 of the schema is n: int, but Plain has x: Tensor"),
        ("(Tensor x, float n, str name='sum') -> ()", "argument 1 of the schema is n: float, but Plain has n: int"),
        ("(Tensor x, int n, str name) -> ()", "argument 2 of the schema is name: str, but Plain has name: str = 'sum'"),
        ("(Tensor x, int n, str name='max') -> ()", "is name: str = 'max', but Plain has name: str = 'sum'"),
        ("(Tensor x, int n) -> ()", "argument 2 of the schema is absent, but Plain has name: str = 'sum'"),
        ("(Tensor x, int n, str name='sum', int k=0) -> ()", "schema is k: int = 0, but Plain has absent"),
        ("(Tensor[] x, int n, str name='sum') -> ()", "schema is x: .*Sequence.*, but Plain has x: Tensor"),
    ],
)
def test_a_call_of_another_schema_is_refused(schema, message):
    with pytest.raises(ValueError, match=f"register: op: .*{message}"):
        check(Plain, schema)


def test_registration_refuses_a_call_of_another_schema():
    spec = _registry.OpSpec(
        name="never_registered", schema="(Tensor x) -> Tensor", call=Plain, reference=lambda call: call.x,
        fake=lambda call: call.x, check=lambda call: None, inputs=None, cost=None, dtypes=(), exact=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"register: never_registered: argument 1 .* absent, but Plain has n: int"):
        _registry.register(spec)
    assert spec.name not in {s.name for s in _registry.specs()}


@pytest.mark.parametrize("spec", SPECS, ids=[s.name for s in SPECS])
def test_an_operator_binds_its_arguments_by_place_and_by_name(spec):
    case = next(c for c in spec.cases if not c.bench)
    args = case.make(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(0))
    call = spec.bind(*args)
    names = [a.name for a in spec.parsed_schema.arguments]
    by_name = spec.bind(args[0], **dict(zip(names[1:], args[1:], strict=False)))
    assert isinstance(call, spec.call)
    for flat in (calls.flat(call), calls.flat(by_name)):
        assert len(flat) == len(names)
        assert all(a is b for a, b in zip(flat, args, strict=False))
