"""Forms of the ops that no case of the models has (``pallas_kernels.verification.variants``)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.variants import epilogue, one_scale, reordered, reordered_norm, windowed
from tests.cuda import support


def selected() -> Iterator[Case]:
    yield epilogue(5, 192, 1120, 32, 96)
    yield epilogue(300, 4096, 4096, 32, 128)
    yield epilogue(64, 4096, 4096, 128, 128)
    yield reordered_norm(64, 4096)
    yield reordered(64, 4096)
    yield one_scale("Llama-3-8B", 16, 1, 1000, "post")
    yield one_scale("Llama-3-8B", 2, 200, 1000, "pre")
    yield windowed("Llama-3-8B", 16, 1, 1000, 300)
    yield windowed("Llama-3-8B", 2, 200, 1000, 300)


CASES = list(selected())


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_kernel_equals_the_reference(case: Case):
    support.check_case(case)
