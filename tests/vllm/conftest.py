"""vLLM in its own environment: `make test-vllm`."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.running import HAS_SMOLLM2, NO_SMOLLM2
from tests.vllm.engines import Served, serve


def pytest_configure(config: pytest.Config) -> None:
    """Engines that were refused leave sockets behind, which are collected when they are: after the last test too."""
    if find_spec("vllm") is not None:
        config.addinivalue_line("filterwarnings", "default::ResourceWarning")  # as long as hooks run
        warnings.simplefilter("default", ResourceWarning)  # and after them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM warns of its own settings."""
    for item in (item for item in items if Path(__file__).parent in item.path.parents):
        item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    if not HAS_SMOLLM2:
        pytest.skip(NO_SMOLLM2)
    return serve(tmp_path_factory.mktemp("served"))
