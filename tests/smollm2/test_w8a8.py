"""The scheme w8a8 on a real model: 8 bits (SmoothQuant)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.smollm2, pytest.mark.slow]


def test_loses_little(perplexity_ratio: Callable[[str], float]) -> None:
    assert perplexity_ratio("w8a8") <= 1.04  # measured: 1.026
