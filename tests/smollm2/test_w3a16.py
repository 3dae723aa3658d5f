"""The scheme w3a16 on a real model: 3-bit weights and float activations (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.smollm2, pytest.mark.slow, pytest.mark.nightly]


def test_loses_little(perplexity_ratio: Callable[[str], float]) -> None:
    assert perplexity_ratio("w3a16") <= 1.83  # measured: 1.711
