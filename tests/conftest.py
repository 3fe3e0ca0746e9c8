"""The device that the generic suites run on: ``pytest --leanops-device cuda`` on a GPU machine; and who shares a
process where tests run in several."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--leanops-device", default="cpu", help="device of the generic operator suites: cpu or cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in ("native", "gpu"):  # what they compile is compiled once a process
            item.add_marker(pytest.mark.xdist_group(item.path.parent.name))
    items.sort(key=lambda item: item.path.parent.name != "triton")  # the two longest tests first


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--leanops-device"))


@pytest.fixture
def threads() -> object:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
