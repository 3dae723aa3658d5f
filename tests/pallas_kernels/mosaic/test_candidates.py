"""The configurations that a sweep would time on a GPU compile, and do not spill."""

from __future__ import annotations

import pytest

from bench.gpu import sweep
from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case
from tests.pallas_kernels.mosaic.support import compile_and_check, needs_cuda_compiler

MODEL = "Llama-3-8B"
CASES = [
    cases.matmul(MODEL, "qkv_proj", 16),
    cases.matmul(MODEL, "gate_up_proj", 64),
    cases.matmul(MODEL, "down_proj", 4096),
    cases.matmul("SmolLM2-135M", "gate_up_proj", 4096),
    cases.matmul(MODEL, "o_proj", 16, bits=8),
    cases.norm("Llama-3-70B/8", 64),
    cases.attention_output(MODEL, 64),
    cases.silu(MODEL, 4096),
    cases.attention(MODEL, 16, 1, 2048),
    cases.attention(MODEL, 16, 1, 2048, kv_bits=16),
    cases.attention(MODEL, 1, 512, 2048),
]


@needs_cuda_compiler
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_compile(case: Case):
    _, *others = sweep.configs(case)
    assert others
    for config in others[:: -(-len(others) // 4)]:  # all of them would take minutes
        compile_and_check(case.function, *case.abstract_inputs, config=config)
