# ruff: noqa: PT009 (assertEqual of torch's TestCase compares nested states of tensors)
"""The claims of torch's own test suite about state and hooks, driven over the entry of ``sm3/optimizer_info.py``."""

from __future__ import annotations

import tempfile
from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter
from torch.optim import SGD
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytest.importorskip("expecttest", reason="torch's test utilities need it: pip install 'leanops[dev]'")
from sm3.optimizer_info import Problem, all_options, sm3
from torch.testing._internal.common_device_type import instantiate_device_type_tests, onlyCUDA
from torch.testing._internal.common_utils import TestCase, parametrize


class TestSM3State(TestCase):
    """Names as in torch's test/test_optim.py, class TestOptimRenewed."""

    dynamo_strict = True  # under Dynamo, an error of the compiler fails the test

    @sm3
    def test_optimizer_can_be_printed(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            self.assertIn("SM3 (\nParameter Group 0", repr(optim_info.optim_cls(Problem(device).params, **kwargs)))

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @sm3
    def test_state_dict_deterministic(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        def given(problem, named):
            return [(f"name{i}", p) for i, p in enumerate(problem.params)] if named else problem.params

        def unnamed(state):
            groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state["param_groups"]]
            return {**state, "param_groups": groups}

        for kwargs in all_options(device, optim_info):
            a = Problem(device)
            first = optim_info.optim_cls(given(a, is_named_optim0), **kwargs)
            for _ in range(10):
                first.step(a.closure(first))
            b = a.copy()
            second = optim_info.optim_cls(given(b, is_named_optim1), **kwargs)
            second.load_state_dict(deepcopy(first.state_dict()))
            for _ in range(10):
                first.step(a.closure(first))
                second.step(b.closure(second))
                self.assertEqual(a.params, b.params, rtol=0, atol=0)
            self.assertEqual(unnamed(first.state_dict()), unnamed(second.state_dict()), rtol=0, atol=0)
            second.param_groups.extend(second.param_groups)  # a group that is there twice has the same saved form
            self.assertEqual(
                unnamed(first.state_dict())["param_groups"][-1], unnamed(second.state_dict())["param_groups"][-1]
            )

    @sm3
    def test_can_load_older_state_dict(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)).to(device)
            opt = optim_info.optim_cls(model.parameters(), **kwargs)
            x = torch.rand(1, 4, 16, 16, device=device)
            for i in range(4):
                if i == 3:
                    old = deepcopy(opt.state_dict())
                    for flag in optim_info.not_og_supported_flags:
                        del old["param_groups"][0][flag]
                    opt.load_state_dict(old)
                opt.zero_grad()
                model(x).sum().backward()
                opt.step()

    @parametrize("is_named_optim0", [True, False])
    @parametrize("is_named_optim1", [True, False])
    @sm3
    def test_can_load_from_to_named_state_dict(self, device, dtype, optim_info, is_named_optim0, is_named_optim1):
        for kwargs in all_options(device, optim_info):
            model = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 1, stride=2), torch.nn.BatchNorm2d(2)).to(device)
            x = torch.rand(1, 4, 16, 16, device=device)

            def make(named, model=model, kwargs=kwargs):
                params = model.named_parameters() if named else model.parameters()
                return optim_info.optim_cls(params, **kwargs)

            first, second = make(is_named_optim0), make(is_named_optim1)
            for opt in (first, second):
                if opt is second:
                    opt.load_state_dict(deepcopy(first.state_dict()))
                for _ in range(3):
                    opt.zero_grad()
                    model(x).sum().backward()
                    opt.step()
            if is_named_optim0 or is_named_optim1:
                names = second.state_dict()["param_groups"][0]["param_names"]
                self.assertEqual(names, ["0.weight", "0.bias", "1.weight", "1.bias"])

    @parametrize("is_named_optim", [True, False])
    @sm3
    def test_save_load_equality_with_weights_only(self, device, dtype, optim_info, is_named_optim):
        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            params = [(f"name{i}", p) for i, p in enumerate(problem.params)] if is_named_optim else problem.params
            opt = optim_info.optim_cls(params, **kwargs)
            for _ in range(3):
                opt.step(problem.closure(opt))
            with tempfile.TemporaryFile() as f:
                torch.save(opt.state_dict(), f)
                for weights_only in (False, True):
                    f.seek(0)
                    loaded = torch.load(f, weights_only=weights_only)
                    self.assertEqual(loaded, opt.state_dict(), rtol=0, atol=0)

    @sm3
    def test_load_nontensor_step(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            opt = optim_info.optim_cls(problem.params, **kwargs)
            for _ in range(3):
                opt.step(problem.closure(opt))
            state = deepcopy(opt.state_dict())
            for entry in state["state"].values():
                entry["step"] = entry["step"].item()
            opt.load_state_dict(state)
            opt.step(problem.closure(opt))
            self.assertEqual(opt.state[problem.weight]["step"].item(), 4.0)

    @onlyCUDA
    @sm3
    def test_state_dict_with_cuda_params(self, device, dtype, optim_info):
        for kwargs in all_options("cpu", optim_info):
            a = Problem("cpu")
            opt = optim_info.optim_cls(a.params, **kwargs)
            for _ in range(3):
                opt.step(a.closure(opt))
            moved = [Parameter(p.detach().to(device)) for p in a.params]
            other = optim_info.optim_cls(moved, **kwargs)
            saved, given = deepcopy(opt.state_dict()), deepcopy(opt.state_dict())
            other.load_state_dict(given)
            self.assertEqual(saved, given)
            on_device = kwargs.get("capturable") or kwargs.get("fused")
            for entry in other.state_dict()["state"].values():
                self.assertEqual(entry["step"].device.type, "cuda" if on_device else "cpu")
            for _ in range(5):
                for p, q in zip(a.params, moved, strict=True):
                    p.grad = torch.rand_like(p)
                    q.grad = p.grad.to(device)
                opt.step()
                other.step()
                self.assertEqual(a.params, moved, rtol=0, atol=0)

    @sm3
    def test_state_dict_pre_hook(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            opt = optim_info.optim_cls(Problem(device).params, **kwargs)
            opt.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
            self.assertEqual(opt.state_dict()["state"]["test"], 1)

    @sm3
    def test_state_dict_post_hook(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            opt = optim_info.optim_cls(Problem(device).params, **kwargs)
            opt.register_state_dict_post_hook(lambda o, s: {**s, "seen": "test" in s["state"]})
            self.assertFalse(opt.state_dict()["seen"])

    @sm3
    def test_state_dict_pre_post_hook(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            opt = optim_info.optim_cls(Problem(device).params, **kwargs)
            opt.register_state_dict_pre_hook(lambda o: o.state.update(test=1))
            opt.register_state_dict_post_hook(lambda o, s: {**s, "seen": s["state"].pop("test") == 1})
            state = opt.state_dict()
            self.assertTrue(state["seen"])
            self.assertNotIn("test", state["state"])

    @sm3
    def test_load_state_dict_pre_hook_and_prepend(self, device, dtype, optim_info):
        def set_in_place(opt, state):
            state["param_groups"][0]["lr"] = 0.002

        def make_another(opt, state):
            mine = deepcopy(state)
            mine["param_groups"][0]["lr"] = 0.003
            return mine

        for kwargs in all_options(device, optim_info):
            opt = optim_info.optim_cls(Problem(device).params, **kwargs)
            state = opt.state_dict()
            opt.register_load_state_dict_pre_hook(set_in_place)
            opt.load_state_dict(state)
            self.assertEqual(opt.param_groups[0]["lr"], 0.002)
            opt.register_load_state_dict_pre_hook(make_another, prepend=True)
            opt.load_state_dict(state)
            self.assertEqual(opt.param_groups[0]["lr"], 0.002)  # the hook that was registered first runs last

    @sm3
    def test_load_state_dict_post_hook(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            opt = optim_info.optim_cls(Problem(device).params, **kwargs)
            opt.register_load_state_dict_post_hook(lambda o: o.state.update(ran=True))
            opt.load_state_dict(opt.state_dict())
            self.assertTrue(opt.state["ran"])

    @sm3
    def test_load_state_dict_pre_post_hook(self, device, dtype, optim_info):
        def another_lr(opt, state):
            return {**state, "param_groups": [{**g, "lr": 0.003} for g in state["param_groups"]]}

        for kwargs in all_options(device, optim_info):
            opt = optim_info.optim_cls(Problem(device).params, **kwargs)
            opt.register_load_state_dict_pre_hook(another_lr)
            opt.register_load_state_dict_post_hook(lambda o: o.state.update(seen=o.param_groups[0]["lr"]))
            opt.load_state_dict(opt.state_dict())
            self.assertEqual(opt.state["seen"], 0.003)

    def _hooks(self, device, info, register):
        for kwargs in all_options(device, info):
            seen = []
            opt = info.optim_cls([torch.tensor([1.0, 1.0], device=device)], **kwargs)
            handle = getattr(opt, register)(lambda o, args, kw, seen=seen: seen.append(o))
            opt.step()
            opt.step()
            handle.remove()
            opt.step()
            self.assertEqual(len(seen), 2)
            self.assertTrue(all(o is opt for o in seen))

    @sm3
    def test_step_post_hook(self, device, dtype, optim_info):
        self._hooks(device, optim_info, "register_step_post_hook")

    @sm3
    def test_step_pre_hook(self, device, dtype, optim_info):
        self._hooks(device, optim_info, "register_step_pre_hook")

    @sm3
    def test_step_all_hooks(self, device, dtype, optim_info):
        for kwargs in all_options(device, optim_info):
            order: list[str] = []

            def note(word, order=order):
                return lambda *_: order.append(word)

            params = [torch.tensor([1.0, 1.0], device=device)]
            both = optim_info.optim_cls(params, **kwargs), SGD(params)
            handles = [
                register_optimizer_step_pre_hook(note("global pre")),
                register_optimizer_step_post_hook(note("global post")),
                *(o.register_step_pre_hook(note("pre")) for o in both),
                *(o.register_step_post_hook(note("post")) for o in both),
            ]
            try:
                both[0].step()
                both[1].step()
            finally:
                for h in handles:
                    h.remove()
            both[0].step()
            self.assertEqual(order, ["global pre", "pre", "post", "global post"] * 2)

    @sm3
    def test_deepcopy_copies_all_public_attrs(self, device, dtype, optim_info):
        def public(obj):
            return {k for k in obj.__dict__ if not k.startswith("_")}

        for kwargs in all_options(device, optim_info):
            problem = Problem(device)
            opt = optim_info.optim_cls(problem.params, **kwargs)
            for _ in range(3):
                opt.step(problem.closure(opt))
            self.assertEqual(public(opt), public(deepcopy(opt)))

    @sm3
    def test_non_empty_state(self, device, dtype, optim_info):
        for entry in optim_info.optim_inputs_func(device=device):
            model = torch.nn.Linear(5, 5).to(device)
            opt = optim_info.optim_cls(model.parameters(), **entry.kwargs)
            model(torch.rand(2, 5, device=device)).sum().backward()
            opt.step()
            self.assertEqual(len(opt.state), 2)
            for state in opt.state.values():
                self.assertGreater(len(state), 0)

    @onlyCUDA
    @parametrize("impl", ["fused", "capturable"])
    @sm3
    def test_cpu_load_state_dict(self, device, dtype, impl, optim_info):
        for entry in optim_info.optim_inputs_func(device="cpu"):
            p = torch.tensor([0.1, 0.2])
            p.grad = torch.rand_like(p)
            opt = optim_info.optim_cls([p], **entry.kwargs)
            opt.step()
            state = deepcopy(opt.state_dict())
            state["param_groups"][0][impl] = True
            moved = p.detach().to(device)
            moved.grad = torch.rand_like(moved)
            other = optim_info.optim_cls([moved], **{**entry.kwargs, impl: True})
            other.load_state_dict(state)
            other.step()
            self.assertEqual(other.state[moved]["step"].device, moved.device)


instantiate_device_type_tests(TestSM3State, globals(), only_for=("cpu", "cuda"))
