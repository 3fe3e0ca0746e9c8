"""Importing leanops: fast, without side effects, and safe before a fork."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run(code: str, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_starts_no_thread_initialises_no_cuda_and_writes_no_file(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    out = run(
        """
        import json, os, threading, torch, sys
        tasks = lambda: len(os.listdir("/proc/self/task"))
        before = tasks()
        import leanops
        print(json.dumps([tasks() - before, threading.active_count(), torch.cuda.is_initialized(),
                          sorted(m for m in ("triton", "cupy", "rich", "plotly") if m in sys.modules)]))
        """,
        tmp_path,
        HOME=str(home),
        XDG_CACHE_HOME=str(home / "cache"),
    )
    threads, active, cuda, heavy = json.loads(out)
    assert (threads, active, cuda, heavy) == (0, 1, False, [])
    assert list(home.rglob("*")) == []
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_import_takes_less_than_150_ms_beyond_torch(tmp_path):
    # of the process itself: other tests may be running beside it
    code = "import torch, time; t = time.process_time(); import leanops; print(time.process_time() - t)"
    best = min(float(run(code, tmp_path)) for _ in range(5))
    assert best < 0.150


def test_import_loads_no_trainer(tmp_path):
    out = run(
        """
        import sys, leanops.optim, leanops.integrations
        print([m for m in ("transformers", "accelerate", "lightning", "peft") if m in sys.modules])
        """,
        tmp_path,
    )
    assert out == "[]\n"


def test_import_loads_no_inputs_of_tests(tmp_path):
    out = run(
        """
        import sys, leanops, leanops.optim
        from leanops import _registry
        cases = lambda: sorted(m for m in sys.modules if m.startswith("leanops.") and m.endswith("cases"))
        print(cases())
        print(all(spec.cases for spec in _registry.specs()), cases())
        """,
        tmp_path,
    )
    assert out.splitlines() == ["[]", "True ['leanops.sm3.cases', 'leanops.zo.cases']"]


FORK = """
import os, torch, leanops as lo
{before}
read, write = os.pipe()
if os.fork() == 0:
    {first}
    os.write(write, lo.zo_noise(100_000, 3).sum(dtype=torch.float64).numpy().tobytes())
    os._exit(0)
os.wait()
import numpy
assert numpy.frombuffer(os.read(read, 8))[0] == float(lo.zo_noise(100_000, 3).sum(dtype=torch.float64))
"""


@pytest.mark.parametrize(
    ("before", "first"),
    [
        pytest.param("pass", "pass", id="after-import"),
        # OpenMP's threads do not survive a fork, in torch itself as here; torch's data workers run on one
        pytest.param("lo.zo_noise(100_000, 3)", "torch.set_num_threads(1)", id="after-use-on-one-thread"),
    ],
)
def test_operators_work_in_a_forked_child(tmp_path, before, first):
    run(FORK.format(before=before, first=first), tmp_path)


@pytest.mark.parametrize("disabled", ["cpu", "cpu,cuda,triton,nvrtc"])
def test_without_its_libraries_the_package_works_and_says_why(tmp_path, disabled):
    out = run(
        """
        import torch, leanops as lo
        from leanops import _native
        print(_native.backends()["cpu"].detail)
        print(lo.zo_noise(3, 1).tolist())
        """,
        tmp_path,
        LEANOPS_DISABLE=disabled,
    )
    reason, values = out.strip().splitlines()
    assert reason == "switched off by LEANOPS_DISABLE"
    import leanops as lo

    assert json.loads(values) == lo.zo_noise(3, 1).tolist()


def test_no_warning_stands_before_the_kernels_of_a_library(tmp_path):
    """The warning of a first use belongs to the reference. A call that a kernel serves does not pass it."""
    out = run(
        """
        import torch, leanops
        from leanops import _native, _registry
        print(_native.backends()["cpu"].loaded, torch._C.DispatchKey.CPU in _registry.unserved,
              {_native.has_kernel(spec.name, "CPU") for spec in _registry.specs() if spec.composite is None})
        """,
        tmp_path,
    )
    if out.startswith("False"):
        pytest.skip("needs the CPU library: `leanops info` says why it is absent")
    assert out == "True False {True}\n"


def test_an_unknown_backend_in_leanops_disable_is_an_error(tmp_path):
    code = """
        try:
            import leanops
        except ValueError as error:
            print(error)
        """
    printed = run(code, tmp_path, LEANOPS_DISABLE="cpu, cuad")
    assert printed == "leanops: LEANOPS_DISABLE must name backends of cpu, cuda, triton, nvrtc, got cuad\n"


def test_each_cuda_operator_gets_the_first_backend_that_has_it(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed: pip install 'leanops[triton]'")
    out = run(
        """
        import json, torch
        from typing import NamedTuple
        import leanops
        from leanops import _native, _registry, info
        from leanops._registry import OpSpec

        torch.version.cuda = "13.0"  # what a GPU machine has; nothing is launched
        for spec in _registry.specs():
            _registry.implement(spec.name, "CUDA", spec.reference)  # in the library's place
            _native._servers[spec.name, "CUDA"] = "cuda"
        states = [_native._python_backend("triton", "triton")]
        class Call(NamedTuple):
            x: torch.Tensor

        _registry.register(OpSpec(
            name="triton_only", schema="(Tensor x) -> Tensor", call=Call, reference=lambda call: call.x,
            fake=lambda call: torch.empty_like(call.x), check=lambda call: None, inputs=None, cost=None,
            dtypes=(torch.float32,), exact=True, backends={"triton": lambda: lambda call: call.x + 1},
        ))
        states.append(_native._python_backend("triton", "triton"))
        _native._backends["triton"] = states[-1]
        print(json.dumps([[s.state, s.detail] for s in states]))
        print(_native.has_kernel("triton_only", "CUDA"), info.serving(_registry.spec("triton_only"), "cuda"),
              _native.server("zo_axpy_", "CUDA").name)
        """,
        tmp_path,
    )
    states, served = out.splitlines()
    assert json.loads(states) == [
        ["available", "not needed: cuda has every CUDA operator"],
        ["in use", "serves triton_only"],
    ]
    assert served == "True triton cuda"
