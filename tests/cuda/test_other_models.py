"""Every kernel against the reference at the shapes of the other models: heads, widths and groups differ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.shapes import MODELS
from tests.cuda import support, test_kernels

# One number for each linear, so that every model sees decode and prefill.
ROWS = (1, 16, 128, 256)


def selected() -> Iterator[Case]:
    """Every op of every model but the one in test_kernels."""
    for model, layer in MODELS.items():
        if model == test_kernels.MODEL:
            continue
        for linear, rows in zip(layer.linears, ROWS, strict=True):
            yield cases.matmul(model, linear, rows)
        yield from (cases.norm(model, 128), cases.attention_output(model, 16), cases.silu(model, 256))
        yield cases.append(model, 128)
        yield cases.attention(model, 16, 1, 2048)
        yield cases.attention(model, 1, 512, 2048)


CASES = list(selected())


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_kernel_equals_the_reference(case: Case):
    support.check_case(case)
