from __future__ import annotations

from types import ModuleType

import pytest
from native.build import build_module


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The cores without torch, compiled for this run."""
    return build_module(tmp_path_factory.mktemp("native"))
