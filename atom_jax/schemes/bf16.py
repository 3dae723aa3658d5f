"""Linears in bfloat16, multiplied by XLA: the baseline for the other schemes."""

from __future__ import annotations

from atom_jax.schemes.base import Scheme

SCHEME = Scheme(
    name="bf16",
    about="not quantized",
    weight=None,
    unused={
        "group_size": 128,
        "num_outliers": 0,
        "clip_a": 0.9,
        "rotate_inner": False,
        "gather_inputs": False,
        "head_bits": 16,
    },
    defaults={"kv_bits": 16, "center_keys": False},
)
