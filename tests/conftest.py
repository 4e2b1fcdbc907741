"""Settings of all tests."""

import os

import pytest

# Before the first import of torch, and for the processes that tests start: these networks are so small that more
# threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests last, so that most failures show early."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """A test draws the same numbers alone and among others."""
    import torch

    torch.manual_seed(0)
