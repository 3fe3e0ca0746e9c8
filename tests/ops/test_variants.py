"""Variants of an operator: the generic suites find a wrong one, and a right one can be called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import test_contract, test_fuzz, test_numerics
from opsuite import backends

from leanops._registry import BadInput, Case, Cost, Inputs, OpSpec, Variant
from leanops.common.checks import require

CPU = torch.device("cpu")
CASE = Case("9", lambda device, dtype, generator: (torch.zeros(9, dtype=dtype), torch.randn(9).to(dtype)))


class Double(NamedTuple):
    out: torch.Tensor
    x: torch.Tensor


def doubled_(call: Double) -> None:
    call.out.copy_(2 * call.x)


def nearly_(call: Double) -> None:
    doubled_(call)
    call.out[3] += 1


def partly_(call: Double) -> None:
    y = torch.empty_like(call.x)
    y[1:] = 2 * call.x[1:]
    call.out.copy_(y)


def by_threads_(call: Double) -> None:
    call.out.copy_(2 * call.x + (torch.get_num_threads() == 3))


def keeping_(call: Double, kept: list[torch.Tensor]) -> None:
    kept.append(call.x)
    doubled_(call)


def check(call: Double) -> None:
    out, x = list(call.out.shape), list(call.x.shape)
    require(out == x, f"double_: out must have shape {x}, got {out}")


def double(*names: str) -> OpSpec:
    """An operator with these variants, which is not registered."""
    loaders = {
        "add": lambda: lambda call: torch.add(call.x, call.x, out=call.out),
        "nearly": lambda: nearly_,
        "partly": lambda: partly_,
        "threads": lambda: by_threads_,
        "keeping": lambda: partial(keeping_, kept=[]),
    }
    inputs = Inputs(
        cases=(CASE,),
        fuzz=lambda draw, dtype: (torch.zeros(5, dtype=dtype), draw.tensor([5], dtype)),
        bad_inputs=(BadInput("shape", lambda d: (torch.ones(2), torch.ones(3)), r"double_: out .*\[3\].*\[2\]"),),
    )
    spec = OpSpec(
        name="double_",
        schema="(Tensor(a!) out, Tensor x) -> ()",
        call=Double,
        reference=doubled_,
        fake=lambda call: None,
        check=check,
        inputs=lambda: inputs,
        cost=lambda call: Cost(call.x.nbytes, call.x.nbytes),
        dtypes=(torch.float32,),
        exact=True,
        variants={name: Variant(loaders[name]) for name in names},
    )
    spec.__dict__["op"] = partial(spec.run, "add")  # what torch would dispatch to
    return spec


def suites(spec: OpSpec, threads: object) -> dict[str, Callable[[], None]]:
    case = (spec, CASE, torch.float32, CPU)

    @settings(max_examples=5, database=None)
    @given(data=st.data())
    def fuzz(data: object) -> None:
        test_fuzz.test_any_input_agrees_with_the_reference.hypothesis.inner_test(spec, torch.float32, CPU, data)

    return {
        "agreement": lambda: test_numerics.test_backends_agree_with_the_reference(*case),
        "unwritten": lambda: test_numerics.test_every_output_element_is_written(*case),
        "threads": lambda: test_numerics.test_two_runs_and_any_thread_count_give_the_same_bits(*case, threads),
        "fuzz": fuzz,
        "bad input": lambda: test_contract.test_bad_input_is_refused_before_a_byte_changes(
            spec, spec.bad_inputs[0], CPU
        ),
        "kept": lambda: test_contract.test_no_call_keeps_a_tensor(*case),
    }


@pytest.mark.parametrize(
    ("name", "suite"),
    [("nearly", "agreement"), ("nearly", "fuzz"), ("partly", "unwritten"), ("threads", "threads"), ("keeping", "kept")],
)
def test_the_suites_find_a_wrong_variant(name, suite, threads):
    with pytest.raises(AssertionError, match=name):
        suites(double("add", name), threads)[suite]()


def test_the_suites_pass_a_right_variant(threads):
    for suite in suites(double("add"), threads).values():
        suite()


def test_a_variant_is_called_as_the_operator_is():
    spec = double("add")
    out, x = torch.zeros(3), torch.ones(3, requires_grad=True)
    version = out._version
    with torch.autocast("cpu", torch.bfloat16):
        spec.run("add", out, x)
    assert out.tolist() == [2.0, 2.0, 2.0]
    assert out._version > version
    assert not out.requires_grad
    with pytest.raises(ValueError, match=r"double_: out must have shape \[3\], got \[2\]"):
        spec.run("add", torch.zeros(2), x)
    with pytest.raises(ValueError, match=r"double_: .* must not overlap in memory"):
        spec.run("add", x.detach(), x.detach())
    with pytest.raises(KeyError, match="subtract"):
        spec.run("subtract", out, x)


def test_a_kernel_is_loaded_once_and_at_its_first_use():
    loads = []
    spec = replace(double(), variants={"add": Variant(lambda: loads.append(1) or doubled_)})
    assert loads == []
    out, x = torch.zeros(3), torch.ones(3)
    for _ in range(2):
        spec.kernel("add")(out, x)
    assert loads == [1]
    assert out.tolist() == [2.0, 2.0, 2.0]


def test_variants_are_offered_on_their_devices():
    spec = replace(
        double(),
        variants={"any": Variant(lambda: doubled_), "gpu": Variant(lambda: doubled_, devices=("cuda",))},
    )
    assert spec.variants_on(CPU) == ["any"]
    assert spec.variants_on(torch.device("cuda", 1)) == ["any", "gpu"]
    assert [name for name, _ in backends(double("add"), CPU)] == ["dispatched", "add"]
