from __future__ import annotations

from types import ModuleType

import pytest
from native.build import build_module


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The cores without torch."""
    return build_module()
