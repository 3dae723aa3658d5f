"""Every op has what dispatch, explain and the benchmarks ask of it, and pallas_kernels needs nobody else."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import grouped_matmul, quantize, quantize_int8, quantize_weight
from pallas_kernels.devices import IMPLEMENTATIONS, NEED_VERDICT, REFERENCE
from pallas_kernels.verification import cases
from pallas_kernels.verification.checks import all_checks
from tests.pallas_kernels import oracle

PACKAGE = Path(pallas_kernels.__file__).parent
TESTS = Path(__file__).parent
PARTS = ("api.py", "call.py", "reference.py")
# A folder with any part is an op, which must have all of them.
OPS = sorted({file.parent.name for part in PARTS for file in PACKAGE.glob(f"*/{part}")})


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def implementations(op: str) -> list[str]:
    """The modules in the op's folder that dispatch knows by their names, or that have a function ``run``."""
    return [
        file.stem
        for file in sorted((PACKAGE / op).glob("*.py"))
        if file.stem in IMPLEMENTATIONS
        or any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in parse(file).body)
    ]


KERNELS = [(op, name) for op in OPS for name in implementations(op) if name != REFERENCE]


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


def imported_ops(folder: Path) -> set[str]:
    """Ops that the test modules of ``folder`` import, or of whose folders they import something.

    Ruff sees to it that what is imported is used.
    """
    found = set()
    for file in folder.glob("test_*.py"):
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ImportFrom) and node.module and file != Path(__file__):
                package, *rest = node.module.split(".")
                if package == "pallas_kernels":
                    found |= {rest[0]} if rest else {alias.name for alias in node.names}
    return found & set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_complete(op: str):
    assert [part for part in PARTS if not (PACKAGE / op / part).exists()] == []
    call = importlib.import_module(f"pallas_kernels.{op}.call")
    assert call.Call._fields and issubclass(call.Call, tuple)
    assert parameters(call.cost) == parameters(call.describe) == ["call"]
    assert getattr(pallas_kernels, op) is getattr(importlib.import_module(f"pallas_kernels.{op}.api"), op)
    reference = importlib.import_module(f"pallas_kernels.{op}.{REFERENCE}")
    assert parameters(reference.run) == ["call", "config"]


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_a_kernel_is_complete(op: str, name: str):
    assert name in IMPLEMENTATIONS, "the predicate of its devices is missing"
    assert (IMPLEMENTATIONS[name](jax.devices("cpu")[0]) is None) == (name not in NEED_VERDICT)
    module = importlib.import_module(f"pallas_kernels.{op}.{name}")
    assert parameters(module.run) == ["call", "config"]
    assert parameters(module.unsupported) == parameters(module.configs) == ["call"]


@pytest.mark.parametrize(("op", "name"), [each for each in KERNELS if each[1] in NEED_VERDICT])
def test_a_kernel_is_verified(op: str, name: str):
    """By calls of the doctor, small ones and those of a real layer, and by the cases of the models."""
    checks = [check for check in all_checks().values() if check.op == op]
    assert {check.size for check in checks} == {"small", "real"}
    assert op in {case.op for case in cases.all_cases()}
    module = importlib.import_module(f"pallas_kernels.{op}.{name}")
    configs = module.configs(checks[0].case.call)
    assert configs and all(map(dataclasses.is_dataclass, configs))
    assert len(set(configs)) == len(configs)  # a dataclass that is not frozen has no hash


def test_every_op_has_tests():
    assert imported_ops(TESTS) == set(OPS)
    for folder, implementation in (("mosaic", "mosaic_sm90"), ("native", "native_cpu")):
        assert imported_ops(TESTS / folder) == {op for op, name in KERNELS if name == implementation}


def test_all_ops_are_found():
    assert {"grouped_matmul", "kv_append", "paged_attention", "prefill_attention"} <= set(OPS)
    assert {("prefill_attention", "mosaic_sm90"), ("grouped_matmul", "native_cpu")} <= set(KERNELS)


def test_a_weight_is_rounded_and_multiplied():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(4, 1024)), rng.normal(size=(64, 1024)).astype(np.float32)
    for w in (
        quantize_weight(weight, group_size=128, num_outliers=128, clip_w=1.0),
        quantize_weight(weight, group_size=None, num_outliers=0, clip_w=None),
        quantize_int8(weight),
    ):
        y = grouped_matmul(quantize(jnp.asarray(x, jnp.float32), w.activation_format(1.0)), w)
        assert oracle.relative_error(np.asarray(y), x @ weight.T) < (0.02 if w.group_size == 0 else 0.3)
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
