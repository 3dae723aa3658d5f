"""The scheme w4a8kv4 on a real model: 4-bit weights, 8-bit activations, 4-bit cache (QServe)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.smollm2, pytest.mark.slow, pytest.mark.nightly]


def test_loses_little(perplexity_ratio: Callable[[str], float]) -> None:
    assert perplexity_ratio("w4a8kv4") <= 1.24  # measured: 1.194
