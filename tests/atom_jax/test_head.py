"""The embedding and the head in INT8 (``Format.head_bits``)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.config import preset
from atom_jax.embedding import Embedding, head_table, round_table
from atom_jax.errors import AtomError
from atom_jax.layers import head_logits
from pallas_kernels import QuantizedWeight, use_implementation
from pallas_kernels.dispatch import record_choices
from tests.atom_jax.models import tiny_config
from tests.pallas_kernels import oracle

CONFIG = tiny_config(preset("w4a16", group_size=32))
TABLE = np.random.default_rng(0).normal(size=(160, 64)).astype(np.float32)


@pytest.mark.parametrize("implementation", ["reference", "native_cpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_those_of_the_float_product(implementation: str, dtype: Any) -> None:
    """Of the rounded head. A hidden state with a channel 100 times the others costs nothing."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(5, 64)) * np.where(np.arange(64) == 7, 100, 1), dtype)
    head = round_table(TABLE)
    with use_implementation(implementation), record_choices() as choices:
        logits = head_logits(hidden, head, CONFIG)
    expected = np.asarray(hidden, np.float64) @ np.asarray(head.dequantize(), np.float64).T
    assert logits.dtype == jnp.float32
    assert oracle.relative_error(np.asarray(logits), expected) < 1e-4
    matmuls = [choice for choice in choices if choice.op == "grouped_matmul"]
    assert len(matmuls) == 1  # the head is read once
    assert matmuls[0].implementation == implementation


def test_a_float_head_is_multiplied_in_floats() -> None:
    with record_choices() as choices:
        logits = head_logits(jnp.ones((2, 64)), jnp.asarray(TABLE, jnp.bfloat16), CONFIG)
    assert [choice.op for choice in choices] == ["float_matmul"]
    assert oracle.relative_error(np.asarray(logits), np.broadcast_to(TABLE.sum(1), (2, 160))) < 0.01


def test_rows_are_those_of_the_table_within_a_step() -> None:
    """Half a step, and what the rounding of the table and of its scales to bfloat16 adds."""
    table = round_table(TABLE)
    rows = Embedding(table, jnp.dtype(jnp.float32)).rows(jnp.asarray([0, 159, 1000]))
    steps = np.abs(TABLE).max(axis=1, keepdims=True) / 127
    assert (np.abs(np.asarray(rows) - TABLE[[0, 159, 159]]) <= steps[[0, 159, 159]]).all()


def test_a_tied_head_is_the_table_of_the_embedding() -> None:
    table = round_table(TABLE)
    embedding = Embedding(table, jnp.dtype(jnp.float32))
    assert head_table({"embedding": embedding}) is table
    assert head_table({"embedding": TABLE}) is TABLE
    assert head_table({"embedding": embedding, "lm_head": TABLE}) is TABLE


def test_defaults() -> None:
    assert preset("bf16").head_bits == 16
    assert {preset(scheme).head_bits for scheme in ("w4a4kv4", "w4a8kv4", "w4a16", "w3a16", "w8a8")} == {8}
    assert preset("w4a4kv4", head_bits=16).head_bits == 16
    with pytest.raises(AtomError, match="head_bits"):
        preset("w4a4kv4", head_bits=4)
    with pytest.raises(AtomError, match="bf16 has no setting head_bits"):
        preset("bf16", head_bits=8)


def test_a_table_in_int8_takes_a_byte_a_number() -> None:
    table = round_table(TABLE)
    assert isinstance(table, QuantizedWeight)
    assert table.outliers.nbytes == TABLE.size and table.scales.nbytes == 4 * len(TABLE)
