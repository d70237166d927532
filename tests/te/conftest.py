"""Transformer Engine's Python half over a stub, in the environment that `make test-te` makes for it."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

try:
    version = importlib.metadata.version("transformer-engine")
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["test_*.py"]  # every other environment
else:
    import stub

    if version != stub.VERSION:
        raise pytest.UsageError(f"tests/te are for transformer-engine {stub.VERSION}, but {version} is here")
    stub.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.te)
