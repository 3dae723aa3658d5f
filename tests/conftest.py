"""What a test run needs before JAX is imported: the platform, the ``cuda`` marker, Hypothesis profiles."""

from __future__ import annotations

import os
import re
from pathlib import Path

import hypothesis
import pytest

pytest.register_assert_rewrite("tests.convert.jobs")  # a helper whose asserts must say what differs

_CUDA_TESTS = Path(__file__).parent / "cuda"

# The first example of a shape compiles, so its time says nothing; CI repeats the same examples on every run.
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, print_blob=True)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def _gpu_wanted(markexpr: str) -> bool:
    """Whether ``-m`` selects the CUDA tests."""
    return re.search(r"(?<!not )\bcuda\b", markexpr) is not None


def _use_cpu_devices(count: int) -> None:
    """Makes JAX divide the CPU into devices, in this process: others are as users start them."""
    import jax  # a plugin of pytest may have imported it already, so the environment would come too late

    jax.config.update("jax_num_cpu_devices", count)


def pytest_configure(config: pytest.Config) -> None:
    if _gpu_wanted(config.option.markexpr):
        # Other frameworks (cuBLAS peers, torch) share the device with the tests.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        _use_cpu_devices(8)  # a model is divided among some of them


@pytest.hookimpl(tryfirst=True)  # before -m deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_CUDA_TESTS):
            item.add_marker(pytest.mark.cuda)
    # Files that take minutes first: a worker that began one last would end long after the others.
    long = {item.path for item in items if item.get_closest_marker("smollm2")}
    items.sort(key=lambda item: item.path not in long)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None:
        return
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip(
            f"needs a CUDA GPU and `pytest -m cuda`; JAX {jax.__version__} runs on {jax.default_backend()}"
        )
