"""The device that the generic suites run on: ``pytest --leanops-device cuda`` on a GPU machine; and who shares a
process where tests run in several."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = ["gpu.fixtures", "interpreter.remote", "native.fixtures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--leanops-device", default="cpu", help="device of the generic operator suites: cpu or cuda")


_TOGETHER = ("test_build.py", "test_cli.py", "test_convergence.py")  # what they build, they build once
_LONG = ("test_interpreted.py", "test_build.py", "test_finetune_minilm.py")  # first, or the last worker waits for them


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in (item.path.name, item.path.parent.name)), None)

    for item in items:
        if group := place(item, _TOGETHER):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: place(item, _LONG) is None)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--leanops-device"))


@pytest.fixture
def threads() -> object:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
