"""What every family's kernels for GPUs share: NVRTC takes their text, and all of them are compiled ahead of time."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from aot import aot, kernels
from aot.checks import over_archs
from families import FAMILIES, ROOT

from leanops import _registry
from leanops.common import nvrtc

WITH_NVRTC = [family for family in FAMILIES if kernels.of(family).nvrtc()]
SAMPLE = kernels.of(WITH_NVRTC[0]).nvrtc()[0]


@pytest.fixture(scope="module")
def library() -> aot.Nvrtc:
    found = aot.find_nvrtc()
    if found is None:
        pytest.skip("no NVRTC library: pip install nvidia-cuda-nvrtc")
    return found


def nvrtc_text(kernel: nvrtc.Kernel) -> str:
    return nvrtc.program(kernel, ROOT / "csrc")


@over_archs
@pytest.mark.parametrize("family", WITH_NVRTC)
def test_nvrtc_compiles_what_the_launchers_launch(family, arch, library):
    for kernel in kernels.of(family).nvrtc():
        binary = nvrtc.compiled(library, nvrtc_text(kernel), nvrtc.target(library, arch))
        assert binary.startswith(b"\x7fELF")


def flushing(ptx: bytes) -> list[str]:
    """Instructions that flush subnormals, without the approximations that the source asks for by name."""
    found = re.findall(r"\S+\.ftz\.\S+", ptx.decode())
    return [name for name in found if ".approx." not in name]


@pytest.mark.parametrize("family", WITH_NVRTC)
def test_nvrtc_flushes_no_subnormal(family, library):
    for kernel in kernels.of(family).nvrtc():
        assert flushing(nvrtc.compiled(library, nvrtc_text(kernel), "compute_90")) == []


def test_flushing_is_seen(library):
    """With the option that CuPy would add."""
    texts = [nvrtc_text(kernel) for family in WITH_NVRTC for kernel in kernels.of(family).nvrtc()]
    options = (*nvrtc.OPTIONS, "-ftz=true")
    assert any(flushing(nvrtc.compiled(library, text, "compute_90", options)) for text in texts)


def test_a_launcher_loads_what_nvrtc_compiled_and_the_next_process_what_it_finds(library, tmp_path, monkeypatch):
    """With the parts of CuPy that need no device."""
    loaded: list[bytes] = []
    module = SimpleNamespace(load=loaded.append, get_function=lambda name: name)
    cuda = SimpleNamespace(nvrtc=library, Device=lambda i: nullcontext(), Module=lambda: module)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc._loaded.__wrapped__(SAMPLE, 0) == "entry"
    monkeypatch.setattr(nvrtc, "compiled", lambda *args: pytest.fail("compiled again"))
    assert nvrtc._loaded.__wrapped__(SAMPLE, 0) == "entry"
    assert loaded[0] == loaded[1]
    assert loaded[0].startswith(b"\x7fELF")


def test_an_error_of_nvrtc_shows_its_log(library):
    with pytest.raises(RuntimeError, match=r"NVRTC: .*\n?.*leanops.cu\(1\): error"):
        nvrtc.compiled(library, "int broken = ;", "sm_90")


def test_nvrtc_makes_ptx_for_devices_newer_than_itself(library):
    newest = max(library.getSupportedArchs())
    assert nvrtc.target(library, newest) == f"sm_{newest}"
    assert nvrtc.target(library, newest + 1) == f"compute_{newest}"
    assert b".visible .entry entry" in nvrtc.compiled(library, nvrtc_text(SAMPLE), f"compute_{newest}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_of_a_family_is_compiled_ahead_of_time(family):
    """A backend that an operator names has kernels in tests/FAMILY/aot.py."""
    backends = {name for spec in _registry.specs() if _family(spec.reference) == family for name in spec.backends}
    listed = kernels.of(family)
    assert ("triton" in backends) == (listed.triton is not kernels.GpuKernels.triton)
    assert ("nvrtc" in backends) == any(kernel.source.startswith(f"{family}/") for kernel in listed.nvrtc())


def _family(function: Callable[..., object]) -> str:
    return function.__module__.split(".")[1]


def test_every_include_of_the_cores_is_resolved():
    for core in ROOT.glob("csrc/*/*.cuh"):
        assert "#include" not in nvrtc.flatten(core)
