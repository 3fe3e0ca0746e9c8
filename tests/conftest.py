"""What every test shares: the tier, the device of the generic suites (``pytest --leanops-device cuda`` on a GPU
machine), and which tests run in one process where there are several."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import tiers
import torch

pytest_plugins = ["gpu.fixtures", "interpreter.remote", "native.fixtures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--leanops-device", default="cpu", help="device of the generic operator suites: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(tiers.Plugin(), "leanops-tiers")
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings.register_profile(
        "tier", max_examples=tiers.examples(), deadline=None, suppress_health_check=slow
    )
    hypothesis.settings.load_profile("tier")


def pytest_report_header() -> list[str]:
    lines = [f"tier: {tiers.tier()} (LEANOPS_TIER; see docs/testing.md)"]
    if not torch.cuda.is_available():
        lines.append("left out: tests/*/test_device.py, which need a CUDA device; `make gpu` runs them")
    return lines


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    on_device = collection_path.name == "test_device.py"
    return True if on_device and not torch.cuda.is_available() else None


_TOGETHER = ("test_build.py", "test_cli.py", "test_convergence.py")  # in one process each, which builds once
_LONG = (
    "test_interpreted.py",
    "test_build.py",
    "test_finetune_minilm.py",
)  # begun first, since they take longest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def listed(item: pytest.Item, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in (item.path.name, item.path.parent.name)), None)

    for item in items:
        if group := listed(item, _TOGETHER):
            item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: listed(item, _LONG) is None)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--leanops-device"))


@pytest.fixture
def threads() -> object:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
