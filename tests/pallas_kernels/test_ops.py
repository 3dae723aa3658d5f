"""Every op has what dispatch, explain and the benchmarks ask of it, and pallas_kernels needs nobody else."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import grouped_matmul, quantize, quantize_int8, quantize_weight
from pallas_kernels.devices import IMPLEMENTATIONS, REFERENCE
from tests.pallas_kernels import oracle

PACKAGE = Path(pallas_kernels.__file__).parent
OPS = sorted(file.parent.name for file in PACKAGE.glob("*/api.py"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_complete(op: str):
    call = importlib.import_module(f"pallas_kernels.{op}.call")
    assert call.Call._fields and callable(call.cost) and callable(call.describe)
    assert getattr(pallas_kernels, op) is getattr(importlib.import_module(f"pallas_kernels.{op}.api"), op)
    found = [name for name in IMPLEMENTATIONS if (PACKAGE / op / f"{name}.py").exists()]
    assert REFERENCE in found
    for name in found:
        module = importlib.import_module(f"pallas_kernels.{op}.{name}")
        wanted = ("run",) if name == REFERENCE else ("run", "unsupported", "configs")
        assert all(callable(getattr(module, function)) for function in wanted), name


def test_all_ops_are_found():
    assert {"grouped_matmul", "kv_append", "paged_attention", "prefill_attention"} <= set(OPS)


def test_a_weight_is_rounded_and_multiplied():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(4, 1024)), rng.normal(size=(64, 1024)).astype(np.float32)
    for w in (
        quantize_weight(weight, group_size=128, num_outliers=128, clip_w=1.0),
        quantize_weight(weight, group_size=None, num_outliers=0, clip_w=None),
        quantize_int8(weight),
    ):
        y = grouped_matmul(quantize(jnp.asarray(x, jnp.float32), w.activation_format(1.0)), w)
        assert oracle.relative_error(np.asarray(y, np.float32), x @ weight.T) < (
            0.02 if w.group_size == 0 else 0.3
        )
        dequantized = np.asarray(w.dequantize(), np.float64)
        assert oracle.relative_error(dequantized, weight) < (0.01 if w.group_size == 0 else 0.2)


@pytest.mark.parametrize(("group_size", "num_outliers"), [(96, 0), (128, 64), (128, 1024), (None, 1024)])
def test_a_weight_that_is_no_whole_groups_is_an_error(group_size: int | None, num_outliers: int):
    with pytest.raises(ValueError, match=r"1024 channels|quantize_int8"):
        quantize_weight(
            np.ones((2, 1024), np.float32), group_size=group_size, num_outliers=num_outliers, clip_w=1.0
        )


def test_nothing_else_of_the_project_is_imported():
    script = (
        "import sys, pallas_kernels; loaded = {name.split('.')[0] for name in sys.modules};"
        "sys.exit(' '.join(loaded & {'atom_jax', 'convert', 'bench', 'tests', 'flax'}) or 0)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
