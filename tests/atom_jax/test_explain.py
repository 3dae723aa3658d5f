"""``atom-jax explain``: the ops of a step, counted, and what each would run."""

from __future__ import annotations

import collections

import jax
import pytest

from atom_jax.config import preset
from atom_jax.errors import AtomError
from atom_jax.explain import explain
from bench.models import llama_3_8b
from pallas_kernels.native import build
from pallas_kernels.native.config import NativeConfig
from pallas_kernels.native.instruction_sets import available
from tests.atom_jax.command import fails, run, run_json

OPS = {
    "grouped_matmul": 4,
    "norm_quantize": 2,
    "quantize": 1,
    "silu_quantize": 1,
    "kv_append": 1,
    "paged_attention": 1,
}
needs_new_jax = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 cannot trace a kernel that writes to a Ref inside a scan"
)


# The head in INT8 multiplies what its input is rounded to, and what the rounding leaves.
HEAD_OPS = {"quantize": 2, "grouped_matmul": 1}


def calls(lines, part: str = "layer") -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for line in lines:
        if line.part == part:
            counts[line.op] += line.count
    return dict(counts)


def test_a_decode_step_is_these_ops_and_a_cpu_runs_native_kernels():
    lines = explain(llama_3_8b(), batch=16, seq=1, context=2048)
    assert calls(lines) == OPS and calls(lines, "head") == HEAD_OPS
    assert {line.implementation for line in lines} == {"native_cpu"}
    assert {line.reason for line in lines} == {"mosaic_sm90 needs compute capability 9.0, this is cpu"}
    assert {line.configuration for line in lines} == {str(NativeConfig(available()[0]))}


def test_a_cpu_runs_the_reference_where_native_kernels_cannot_run(monkeypatch):
    monkeypatch.setattr(build, "api_version", lambda: (9, 1))
    lines = explain(llama_3_8b(), batch=16, seq=1, context=2048)
    assert calls(lines) == OPS
    assert {line.implementation for line in lines} == {"reference"}
    assert all("native_cpu needs a jaxlib with version" in line.reason for line in lines)
    with pytest.raises(AtomError, match=r"native_cpu needs .*, the installed one has 9\.1"):
        explain(llama_3_8b(), batch=16, seq=1, context=2048, implementation="native_cpu")


def test_the_reference_runs_where_it_is_asked_for():
    lines = explain(llama_3_8b(), batch=16, seq=1, context=2048, implementation="reference")
    assert calls(lines) == OPS
    assert {(line.implementation, line.reason, line.configuration) for line in lines} == {
        ("reference", "requested", "")
    }


def test_bytes_are_those_of_the_weights_and_times_follow():
    (line,) = [
        line
        for line in explain(llama_3_8b(), batch=16, seq=1, context=2048)
        if line.shape == "M=16 N=28672 K=4096"
    ]
    body, groups = 4096 - 128, 31
    weights = 28672 * (body // 2 + 128 + 4 * (groups + 1))
    assert weights < line.bytes < 1.03 * weights  # activations in and out are the rest
    assert line.roofline_seconds == pytest.approx(line.bytes / 4.8e12)


@pytest.mark.parametrize(
    ("scheme", "matmul"),
    [("w8a8", "grouped_matmul"), ("w4a8kv4", "two_level_matmul"), ("w4a16", "weight_only_matmul")],
)
def test_the_baselines_have_their_ops(scheme: str, matmul: str):
    lines = explain(llama_3_8b(preset(scheme)), batch=16, seq=1, context=2048)
    assert calls(lines)[matmul] == 4
    # Eight bits a weight take twice the time of four: the matmuls are bound by their weights.
    gate_up = next(line for line in lines if line.op == matmul and "N=28672" in line.shape)
    assert gate_up.bytes / (28672 * 4096) == pytest.approx(1.0 if scheme == "w8a8" else 0.55, rel=0.06)


def test_the_head_computes_the_last_token_of_each_sequence():
    for seq in (1, 512):
        lines = explain(llama_3_8b(), batch=4, seq=seq, context=2048)
        (matmul,) = [line for line in lines if line.part == "head" and line.op == "grouped_matmul"]
        assert matmul.shape == "M=8 N=128256 K=4096 8-bit"
    lines = explain(llama_3_8b(preset("bf16")), batch=4, seq=1, context=2048)
    assert calls(lines, "head") == {"float_matmul": 1}


def test_a_chunk_is_prefilled_by_another_attention():
    lines = explain(llama_3_8b(), batch=1, seq=512, context=2048)
    expected = {**OPS, "prefill_attention": 1}
    del expected["paged_attention"]
    assert calls(lines) == expected


@pytest.mark.parametrize(("seq", "op"), [(1, "paged_attention"), (512, "prefill_attention")])
def test_attention_counts_the_keys_in_the_window(seq: int, op: str):
    def attention(windows: tuple[int | None, ...], context: int):
        config = llama_3_8b()
        config = config.replace(num_layers=2, windows=windows)
        return next(line for line in explain(config, batch=1, seq=seq, context=context) if line.op == op)

    full = attention((), 8192)
    assert "window" not in full.shape and attention((None, 1024), 8192) == full  # that with the most keys
    windowed = attention((1024, 512), 8192)
    assert windowed.shape == f"{full.shape} window=1024"
    # 8 heads of 64 + 8 bytes, key and value; the first query sees 1023 keys before it.
    assert full.bytes - windowed.bytes == (8192 - (seq + 1023)) * 8 * 2 * 72


@needs_new_jax
def test_what_a_hopper_gpu_would_run_can_be_asked_on_a_cpu():
    lines = explain(llama_3_8b(), batch=16, seq=1, context=2048, implementation="mosaic_sm90")
    assert calls(lines) == OPS
    assert {line.implementation for line in lines} == {"mosaic_sm90"}
    matmuls = [line.configuration for line in lines if line.op == "grouped_matmul" and line.part == "layer"]
    assert all("block_m=16" in configuration for configuration in matmuls)


def test_an_implementation_that_does_not_serve_the_shapes_is_one_error():
    naive = llama_3_8b(preset("w4a4kv4", group_size=None, num_outliers=0, kv_bits=16))
    with pytest.raises(AtomError, match=r"mosaic_sm90 does not support this call"):
        explain(naive, batch=16, seq=1, context=2048, implementation="mosaic_sm90")


def test_command(checkpoint):
    shown = run_json("explain", checkpoint, "--batch", 2, "--prompt", 8, "--context", 32)
    assert set(shown) == {"device", "decode", "prefill"}
    assert {line["op"]: line["count"] for line in shown["decode"]}["kv_append"] == 1
    assert "kv_append" in run("explain", checkpoint).stdout
    fails("explain", checkpoint, "--implementation", "abacus", parts=["abacus", "reference"])
    fails("explain", checkpoint, "--implementation", "mosaic_sm80", parts=["did you mean mosaic_sm90?"])
