"""Every operator: torch's own checks, compilation and export, autograd's view of mutation, and bad input."""

from __future__ import annotations

import re
import weakref

import pytest
import torch
from opsuite import SPECS, assert_same_bits, backends, clone, make, outputs, over_cases, over_specs, run, tensors
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


@over_cases()
def test_opcheck(spec, case, dtype, device):
    args = make(case, device, dtype)
    torch.library.opcheck(spec.op, args)
    if spec.autograd is not None:
        grad = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in clone(args)]
        torch.library.opcheck(spec.op, grad)


@over_cases(where=lambda spec: spec.mutates)
def test_a_saved_tensor_that_was_mutated_is_noticed(spec, case, dtype, device):
    args = make(case, device, dtype)
    for written in [t for t in spec.mutated(args) if t.numel()]:
        weight = torch.ones(written.shape, device=device, requires_grad=True)  # float: `written` may hold integers
        loss = (weight * written).sum()  # saves `written`
        spec.op(*args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@over_cases(where=lambda spec: spec.mutates)
def test_runs_under_inference_mode(spec, case, dtype, device):
    want = run(spec, make(case, device, dtype))
    with torch.inference_mode():
        args = make(case, device, dtype)
        spec.op(*args)
        got = outputs(spec, args, None)
        assert_same_bits([g.clone() for g in got], [w.clone() for w in want])


@over_cases()
def test_autocast_changes_nothing(spec, case, dtype, device):
    """autocast must not change the dtype of a product that a kernel asks torch for."""
    args = make(case, device, dtype)
    want = run(spec, args)
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, low):
            got = run(spec, args)
        assert_same_bits(got, want, str(low))


@over_specs(where=lambda spec: spec.autograd is not None)
def test_autocast_changes_no_gradient(spec, device):
    case = next(c for c in spec.cases if not c.bench)

    def gradients(enabled):
        args = make(case, device, torch.float32)
        inputs = [a.requires_grad_() for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            results = outputs(spec, args, spec.op(*args))
            return torch.autograd.grad(results, inputs, [torch.ones_like(y) for y in results])

    assert_same_bits(gradients(True), gradients(False))


@over_cases(where=lambda spec: spec.mutates)
def test_launch_is_the_call_without_its_checks(spec, case, dtype, device):
    args = make(case, device, dtype)
    want, versions = run(spec, args), [t._version for t in spec.mutated(args)]
    spec.launch(device, *args)
    assert_same_bits(outputs(spec, args, None), want)
    assert all(t._version > v for t, v in zip(spec.mutated(args), versions, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = tree_map_only(torch.Tensor, mode.from_tensor, args)
        spec.launch(device, *fake)  # goes to the fake kernel, since the backend would read memory


BAD = [pytest.param(s, b, id=f"{s.name}-{b.name}") for s in SPECS for b in s.bad_inputs]
FIRST = [pytest.param(s, next(c for c in s.cases if not c.bench), id=s.name) for s in SPECS]


@pytest.mark.parametrize(("spec", "bad"), BAD)
def test_bad_input_is_refused_before_a_byte_changes(spec, bad, device):
    for name, function in backends(spec, device):
        args = bad.make(device)
        before = clone(args)
        versions = [t._version for t in tensors(args)]
        with pytest.raises(bad.error, match=bad.message):
            function(*args)
        for now, then in zip(tensors(args), tensors(before), strict=True):
            if not now.is_meta:
                assert_same_bits([now.detach().to_dense()], [then.to_dense()], name)
        assert [t._version for t in tensors(args)] == versions


@over_cases()
def test_no_call_keeps_a_tensor(spec, case, dtype, device):
    for name, function in backends(spec, device):
        args = make(case, device, dtype)
        function(*args)
        references = [weakref.ref(t) for t in tensors(args)]
        del args
        # a tensor that C++ still holds keeps its Python object alive
        assert not any(r() is not None for r in references), name


class Call(torch.nn.Module):
    """An operator as a module whose inputs are the tensors among its arguments."""

    def __init__(self, spec, args):
        super().__init__()
        self.op, (self.leaves, self.tree) = spec.op, tree_flatten(args)
        self.places = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]
        written = {id(t) for t in spec.mutated(args)} if spec.mutates else ()
        self.written = [i for i, leaf in enumerate(self.leaves) if id(leaf) in written]

    def inputs(self):
        return tuple(self.leaves[i] for i in self.places)

    def forward(self, *values):
        leaves = list(self.leaves)
        for i, value in zip(self.places, values, strict=True):
            leaves[i] = value
        result = self.op(*tree_unflatten(leaves, self.tree))
        if self.written:
            return [leaves[i] for i in self.written]
        return [result] if isinstance(result, torch.Tensor) else list(result)


@over_cases()
def test_compile_with_fullgraph(spec, case, dtype, device):
    args = make(case, device, dtype)
    want = run(spec, args)
    torch.compiler.reset()
    call = Call(spec, clone(args))
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*call.inputs())
    assert_same_bits(got, want)


@pytest.mark.parametrize(("spec", "case"), FIRST)
def test_compile_with_inductor(spec, case, device):
    args = make(case, device, torch.float32)
    want = run(spec, args)
    torch.compiler.reset()
    call = Call(spec, clone(args))
    got = torch.compile(call, fullgraph=True)(*call.inputs())
    assert_same_bits(got, want)


@pytest.mark.parametrize(("spec", "case"), FIRST)
def test_export(spec, case, device):
    args = make(case, device, torch.float32)
    call = Call(spec, clone(args))
    program = torch.export.export(call, call.inputs())
    assert re.search(rf"leanops\.{spec.name}\b", str(program.graph))
    assert_same_bits(program.module()(*Call(spec, clone(args)).inputs()), run(spec, args))


@pytest.mark.ci  # ten seconds an operator
@pytest.mark.parametrize(("spec", "case"), FIRST)
def test_aot_inductor(spec, case, device, tmp_path):
    if "ScalarType" in spec.schema and TorchVersion(torch.__version__) < (2, 12):
        pytest.skip("AOTInductor mistakes dtype arguments before torch 2.12, pytorch/pytorch#173562")
    args = make(case, device, torch.float32)
    call = Call(spec, clone(args))
    program = torch.export.export(call, call.inputs())
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "op.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    assert_same_bits(loaded(*Call(spec, clone(args)).inputs()), run(spec, args))


@over_specs(where=lambda spec: spec.autograd is None and not spec.mutates)
def test_results_of_inputs_without_grad_do_not_require_grad(spec, device):
    args = make(next(c for c in spec.cases if not c.bench), device, torch.float32)
    assert not any(t.requires_grad for t in tensors(spec.op(*args)))
