"""The device under test, NaN in uninitialised memory, and fixed seeds, for every test file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# `from cases import ...` in any test file, whichever import mode pytest runs in.
sys.path.insert(0, str(Path(__file__).parent))

MARKERS = {
    "gpu": "needs a GPU: runs under --device cuda only",
    "no_poison": "leave uninitialised memory as it comes (a test of speed, of memory, or of the setting itself)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="device that the kernels run on")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if config.getoption("--device") == "cpu":
        # Read when a kernel is defined, that is when its module is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
    # Workers share the cores: each takes its part instead of all of them.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        return
    skip = pytest.mark.skip(reason="needs a GPU: run with --device cuda")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """'cpu' or 'cuda', as --device says."""
    name = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: torch.cuda.is_available() is False")
    return name


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest):
    """Uninitialised memory holds NaN (integers their maximum), in ATen and in C++ alike: an element that a kernel
    forgot to write fails its test. PyTorch fills only while deterministic algorithms are on.
    """
    if "no_poison" in request.keywords:
        yield
        return
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
