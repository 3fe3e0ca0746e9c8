"""The fixture of the compiled cores, for the tests of every family; tests/conftest.py loads it."""

from __future__ import annotations

from types import ModuleType

import pytest
from native.build import build_module


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """The cores without torch. ``native.FAMILY`` holds what ``tests/FAMILY/bindings.cpp`` adds."""
    return build_module()
