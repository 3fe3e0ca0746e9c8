# ruff: noqa: PT009, PT027 (assertEqual of torch's TestCase compares nested states of tensors)
"""The claims of torch's own test suite about steps, driven over the entry of ``sm3/optimizer_info.py``."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

pytest.importorskip("expecttest", reason="torch's test utilities need it: pip install 'leanops[dev]'")
from sm3.optimizer_info import SM3_INFO, Problem, advance, all_options, sm3
from torch.testing._internal.common_cuda import TEST_MULTIGPU
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCUDA
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, TensorTracker, optim_db, optims
from torch.testing._internal.common_utils import TestCase, parametrize

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FLOATS = (F64, F32, BF16, F16)
PAGE = Path(__file__).parents[2] / "docs" / "torch-suite.md"


class TestSM3(TestCase):
    """Names as in torch's test/test_optim.py, class TestOptimRenewed."""

    dynamo_strict = True  # under Dynamo, an error of the compiler fails the test

    @sm3
    def test_optim_infos_do_not_specify_global_cliquey_kwargs(self, device, dtype, optim_info):
        for entry in optim_info.optim_inputs_func(device=device):
            self.assertFalse({"foreach", "fused", "differentiable"} & entry.kwargs.keys())

    @sm3
    def test_errors(self, device, dtype, optim_info):
        for error in optim_info.optim_error_inputs_func(device=device, dtype=dtype):
            self.assertEqual(error.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            entry = error.optimizer_error_input
            params = Problem(device).params if entry.params is None else entry.params
            warns = issubclass(error.error_type, Warning)
            expect = self.assertWarnsRegex if warns else self.assertRaisesRegex
            with expect(error.error_type, error.error_regex):
                optim_info.optim_cls(params, **entry.kwargs)

    def _goes_right(self, info, kwargs, problem, scheduler_makers):
        opt = info.optim_cls(problem.params, **kwargs)
        schedules = [make(opt) for make in scheduler_makers]
        closure = problem.closure(opt)
        initial = closure().item()
        for _ in range(20):
            loss = closure()
            opt.step()
            advance(schedules, loss)
        if kwargs.get("maximize", False):
            self.assertGreater(closure().item(), initial)
        else:
            self.assertLess(closure().item(), initial)

    @parametrize("contiguous", [True, False])
    @parametrize("with_lrsched", [True, False])
    @sm3
    def test_forloop_goes_right_direction(self, device, dtype, optim_info, contiguous, with_lrsched):
        for makers in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for entry in optim_info.optim_inputs_func(device=device):
                problem = Problem(device, contiguous=contiguous)
                self._goes_right(optim_info, {**entry.kwargs, "foreach": False}, problem, makers)

    @onlyCUDA
    @parametrize("with_lrsched", [True, False])
    @sm3
    def test_forloop_goes_right_direction_multigpu(self, device, dtype, optim_info, with_lrsched):
        if not TEST_MULTIGPU:
            self.skipTest("needs two GPUs")
        for makers in optim_info.scheduler_inputs if with_lrsched else [[]]:
            for entry in optim_info.optim_inputs_func(device=device):
                problem = Problem("cuda:0")
                problem.bias = Parameter(problem.bias.detach().to("cuda:1"))
                self._goes_right(optim_info, entry.kwargs, problem, makers)

    @sm3
    def test_param_group_with_lrscheduler_goes_right_direction(self, device, dtype, optim_info):
        for makers in optim_info.scheduler_inputs:
            problem = Problem(device)
            opt = optim_info.optim_cls([{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}])
            schedules = [make(opt) for make in makers]
            closure = problem.closure(opt)
            initial = closure().item()
            for _ in range(20):
                advance(schedules, opt.step(closure))
            self.assertLess(closure().item(), initial)

    @sm3
    def test_tensor_lr(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            a = Problem(device)
            b = a.copy()
            number = optim_info.optim_cls(a.params, **{**kwargs, "lr": 1e-3})
            tensor = optim_info.optim_cls(b.params, **{**kwargs, "lr": torch.tensor(1e-3, dtype=F64)})
            for _ in range(5):
                number.step(a.closure(number))
                tensor.step(b.closure(tensor))
                self.assertEqual(a.params, b.params, rtol=0, atol=0)

    def _compare_between(self, inputs, models, optimizers, exact=True):
        tracker = TensorTracker({"rtol": 0, "atol": 0} if exact else {})
        for i in range(7):
            for x, model, opt in zip(inputs, models, optimizers, strict=True):
                opt.zero_grad()
                model[2].requires_grad_(not 3 <= i < 5)  # a frozen layer, and one that thaws
                if i != 2:  # a step without any gradient
                    model(x).sum().backward()
                opt.step()
            for p, q in zip(*(m.parameters() for m in models), strict=True):
                tracker.add(p)
                tracker.pop_check_set(q, self)
                self.assertEqual(optimizers[0].state[p].keys(), optimizers[1].state[q].keys())
                for key, value in optimizers[0].state[p].items():
                    tracker.add(value)
                    tracker.pop_check_set(optimizers[1].state[q][key], self)
            self.assertTrue(tracker.all_popped())

    def _models(self, info, dtype, kwargs, places):
        """Small models on two devices, or twice on one. Their optimizers also hold a 0-d parameter."""
        x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
        inputs, models, optimizers = [], [], []
        for place, options in zip(places, kwargs, strict=True):
            torch.manual_seed(1)
            model = torch.nn.Sequential(
                torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()
            ).to(place, dtype)
            scalar = torch.rand((), dtype=dtype).to(place).requires_grad_()
            scalar.grad = torch.ones_like(scalar)
            optimizers.append(info.optim_cls([*model.parameters(), scalar], **options))
            inputs.append(x.to(place))
            models.append(model)
        return inputs, models, optimizers

    def _flag_changes_nothing(self, device, dtype, info, flag):
        for entry in info.optim_inputs_func(device=device, dtype=dtype):
            options = [{**deepcopy(entry.kwargs), flag: value} for value in (False, True)]
            self._compare_between(*self._models(info, dtype, options, [device, device]))

    @optims([SM3_INFO], dtypes=[F64])
    def test_foreach_matches_forloop(self, device, dtype, optim_info):
        self._flag_changes_nothing(device, dtype, optim_info, "foreach")

    @optims([SM3_INFO], dtypes=FLOATS)
    def test_fused_matches_forloop(self, device, dtype, optim_info):
        self._flag_changes_nothing(device, dtype, optim_info, "fused")

    @onlyCUDA
    @optims([SM3_INFO], dtypes=FLOATS)
    def test_fused_cpu_matches_cuda(self, device, dtype, optim_info):
        for entry in optim_info.optim_inputs_func(device="cpu", dtype=dtype):
            options = [{**deepcopy(entry.kwargs), "fused": True} for _ in range(2)]
            self._compare_between(*self._models(optim_info, dtype, options, ["cpu", device]), exact=False)

    @parametrize("impl", ["foreach", "fused"])
    @sm3
    def test_mixed_device_dtype(self, device, dtype, optim_info, impl):
        """Dtypes here; devices where there are two GPUs."""
        devices = ["cuda:0", "cuda:1"] if TEST_MULTIGPU else [device]
        start = [torch.rand(2, 3, dtype=d, device=place) for place in devices for d in FLOATS]
        grads = [torch.rand_like(p) for p in start]
        for entry in optim_info.optim_inputs_func(device=device):
            results = []
            for value in (False, True):
                params = [p.clone().requires_grad_() for p in start]
                for p, g in zip(params, grads, strict=True):
                    p.grad = g.clone()
                opt = optim_info.optim_cls(params, **{**deepcopy(entry.kwargs), impl: value})
                for _ in range(7):
                    opt.step()
                results.append((params, [opt.state[p] for p in params]))
            self.assertEqual(results[0], results[1], rtol=0, atol=0)

    @sm3
    def test_set_default_dtype_works_with_foreach(self, device, dtype, optim_info):
        """step is float32 for every default dtype, as torch's fused optimizers have it."""
        before = torch.get_default_dtype()
        for default in (F64, F16):
            try:
                torch.set_default_dtype(default)
                self._flag_changes_nothing(device, F64, optim_info, "foreach")
                p = Parameter(torch.zeros(2, device=device))
                p.grad = torch.ones_like(p)
                opt = optim_info.optim_cls([p])
                opt.step()
                self.assertEqual({v.dtype for v in opt.state[p].values()}, {F32})
            finally:
                torch.set_default_dtype(before)

    @onlyCUDA
    @sm3
    def test_peak_memory_foreach(self, device, dtype, optim_info):
        """A step holds no copy of the parameters, whatever the flags."""
        for kwargs in all_options(device, optim_info):
            params = [torch.rand(1024, 1024, device=device) for _ in range(10)]
            for p in params:
                p.grad = torch.rand_like(p)
            opt = optim_info.optim_cls(params, **kwargs)
            opt.step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            opt.step()
            self.assertLess(torch.cuda.max_memory_allocated() - before, params[0].nbytes)

    @sm3
    def test_fused_error_on_params_on_meta(self, device, dtype, optim_info):
        with torch.device("meta"):
            model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1))
            opt = optim_info.optim_cls(model.parameters(), fused=True)
            for p in model.parameters():
                p.grad = torch.rand_like(p)
        with self.assertRaisesRegex(RuntimeError, "parameter 0 must have data, got a meta tensor"):
            opt.step()
        opt.zero_grad(set_to_none=True)
        model.to_empty(device=device)
        opt.param_groups[0]["params"] = list(model.parameters())
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        opt.step()

    @sm3
    def test_fused_does_not_step_if_foundinf(self, device, dtype, optim_info):
        for entry in optim_info.optim_inputs_func(device=device):
            for scale in (None, torch.ones((1,), device=device)):
                params = [torch.ones((1,), device=device) for _ in range(5)]
                before = [p.clone() for p in params]
                for p in params:
                    p.grad = torch.ones_like(p)
                opt = optim_info.optim_cls(params, fused=True, **entry.kwargs)
                opt.grad_scale, opt.found_inf = scale, torch.ones((), device=device)
                opt.step()
                self.assertEqual([opt.state[p]["step"].item() for p in params], [0.0] * 5)
                self.assertEqual(params, before, rtol=0, atol=0)

    @sm3
    def test_param_groups_weight_decay(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            opt = optim_info.optim_cls(
                [
                    {"params": [problem.weight], **kwargs},
                    {"params": [problem.bias], **deepcopy(kwargs), "weight_decay": 0.0},
                ]
            )
            closure = problem.closure(opt)
            initial = closure().item()
            losses = [opt.step(closure).item() for _ in range(20)]
            self.assertTrue(losses[-1] > initial if kwargs.get("maximize") else losses[-1] < initial)

    @sm3
    def test_param_groups_lr(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            idle = Parameter(torch.randn(2, device=device))
            before = idle.detach().clone()
            opt = optim_info.optim_cls([{"params": problem.params, "lr": 1e-3, **kwargs}, {"params": [idle]}], lr=1e-28)
            initial = problem.closure(opt)().item()
            for _ in range(20):
                loss = problem.closure(opt)().item()
                idle.grad = torch.rand_like(idle)
                opt.step()
            self.assertTrue(loss > initial if kwargs.get("maximize") else loss < initial)
            self.assertEqual(idle, before)

    @sm3
    def test_step_is_noop_when_params_have_no_grad(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            params = [torch.randn(2, 3, device=device) for _ in range(2)]
            before = deepcopy(params)
            opt = optim_info.optim_cls(params, **kwargs)
            self.assertEqual(opt.step(lambda: 7), 7)
            self.assertEqual(params, before, rtol=0, atol=0)
            self.assertEqual(len(opt.state), 0)

    @sm3
    def test_step_is_noop_for_zero_grads(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            if kwargs.get("weight_decay", 0) != 0:
                continue  # decay does not need a gradient
            p = torch.randn((5, 1), device=device, requires_grad=True)
            before = p.detach().clone()
            opt = optim_info.optim_cls([p], **kwargs)
            p.grad = torch.zeros_like(p)
            opt.step()
            self.assertEqual(p, before, rtol=0, atol=0)

    @sm3
    def test_step_iteration(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            opt = optim_info.optim_cls(problem.params, **kwargs)
            for n in range(1, 5):
                opt.step(problem.closure(opt))
                for p in problem.params:
                    step = opt.state[p]["step"]
                    self.assertEqual((step.item(), step.dtype, tuple(step.shape)), (n, F32, ()))

    @sm3
    def test_grads_are_never_inplaced_into(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            opt = optim_info.optim_cls(problem.params, **kwargs)
            for _ in range(3):
                problem.closure(opt)()
                before = [(p.grad, p.grad.clone(), p.grad._version) for p in problem.params]
                opt.step()
                for p, (grad, value, version) in zip(problem.params, before, strict=True):
                    self.assertTrue(p.grad is grad)
                    self.assertEqual(grad, value, rtol=0, atol=0)
                    self.assertEqual(grad._version, version)

    @sm3
    def test_complex(self, device, dtype, optim_info):
        """Refused, where torch's optimizers take real and imaginary part for two numbers."""
        self.assertFalse(optim_info.supports_complex)
        with self.assertRaisesRegex(
            ValueError, "parameter 0 must be real, got torch.complex64; use torch.view_as_real"
        ):
            optim_info.optim_cls([Parameter(torch.zeros(2, dtype=torch.complex64, device=device))])

    @sm3
    def test_rosenbrock_sparse(self, device, dtype, optim_info):
        """Refused, as AdamW refuses it."""
        self.assertFalse(optim_info.supports_sparse)
        p = Parameter(torch.ones(2, device=device))
        p.grad = torch.ones(2, device=device).to_sparse()
        with self.assertRaisesRegex(RuntimeError, "does not support sparse gradients; parameter 0"):
            optim_info.optim_cls([p]).step()


instantiate_device_type_tests(TestSM3, globals(), only_for=("cpu", "cuda"))


def test_the_page_lists_every_test_of_torchs_suite_and_what_became_of_it() -> None:
    rows = re.findall(r"^\| `(test_\w+)` \| (.+?) \|$", PAGE.read_text(), re.MULTILINE)
    listed = dict(rows)
    assert len(listed) == len(rows)
    files = Path(__file__).parent.glob("test_torch_*.py")
    written = {name for file in files for name in re.findall(r"def (test_\w+)\(self", file.read_text())}
    here = {name for name, fate in listed.items() if not fate.startswith("not here: ")}
    assert here == written, here ^ written
    # names that the installed database itself mentions, for tests that an optimizer skips
    known = {name for entry in optim_db for d in entry.decorators if (name := getattr(d, "test_name", None))}
    assert known - {"test_correctness"} <= listed.keys()
