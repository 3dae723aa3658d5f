"""The two ways in which tests run a kernel without a GPU."""

from __future__ import annotations

import pytest

from tests.pallas_kernels.mosaic.support import (
    Execute,
    emulated,
    interpreted,
    needs_cuda_compiler,
    needs_interpret_mode,
)


@pytest.fixture(
    params=[
        pytest.param(interpreted, id="interpreted", marks=needs_interpret_mode),
        pytest.param(emulated, id="emulated", marks=needs_cuda_compiler),
    ]
)
def execute(request: pytest.FixtureRequest) -> Execute:
    """``execute(function, *arguments)`` runs the Mosaic kernels of ``function``."""
    return request.param
