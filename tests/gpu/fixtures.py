"""The fixtures of the CUDA backends and of the emulator of the CUDA cores; tests/conftest.py loads them."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

import pytest
import torch
from gpu.driver import Dispatched
from gpu.emulated import Emulator, build_emulator
from native.build import toolchain

from leanops import _native
from leanops.common import nvrtc


@pytest.fixture(params=["cuda", "triton", "nvrtc"])
def backend(request: pytest.FixtureRequest) -> Any:
    """The operators of the family whose folder the test is in, on one backend."""
    if request.param == "cuda":
        state = _native.backends()["cuda"]
        if not state.loaded:
            pytest.skip(f"the CUDA library is not loaded: {state.detail}")
        return Dispatched()
    package = {"triton": "triton", "nvrtc": "cupy"}[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(f"leanops.{request.path.parent.name}.{request.param}")


@pytest.fixture(scope="session")
def emulator_library() -> ctypes.CDLL:
    try:
        toolchain.find_cxx()
    except toolchain.Unavailable as error:
        pytest.skip(str(error))
    return build_emulator()


@pytest.fixture
def emulator(emulator_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(emulator_library)
    monkeypatch.setattr(nvrtc, "launch", emulator.launch)
    monkeypatch.setattr(nvrtc, "processors", emulator.processors)
    return emulator


@pytest.fixture
def one_thread() -> object:
    """For tests of many small tensors, which torch's threads only wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
