from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def no_warning() -> Iterator[None]:
    """A warning of leanops fails the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
