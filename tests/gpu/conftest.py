"""The emulator of the CUDA cores, built once a session."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch
from gpu.emulated import Emulator, build

from leanops import _nvrtc


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler to build the emulator with")
    return build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulator(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Emulator:
    emulator = Emulator(library)
    monkeypatch.setattr(_nvrtc, "launch", emulator.launch)
    monkeypatch.setattr(_nvrtc, "processors", emulator.processors)
    return emulator


@pytest.fixture
def one_thread() -> object:
    """For tests of many small tensors, which torch's threads only wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
