"""The comparisons of the GPU tests, on a CPU: they accept the reference and see what is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import gpu_generate
from bench.gpu.random_model import random_params
from pallas_kernels.verification import cases, compare, execute, variants
from pallas_kernels.verification.cases import Case
from tests.cuda import support, test_model

MODEL = "SmolLM2-135M"


def inputs_and_result(case: Case) -> tuple[Any, Any]:
    inputs = execute.inputs_of(case, jax.random.key(1))
    return inputs, execute.compiled(case, "reference")(*inputs)


def bump(x: jax.Array, at: tuple[int, ...], by: float = 1) -> jax.Array:
    """``x`` with one element moved."""
    return x.at[at].set((x[at] + by).astype(x.dtype))


def rejects(case: Case, *wrong: Callable[[Any], Any]) -> None:
    """The reference passes; each of ``wrong`` of it does not."""
    inputs, expected = inputs_and_result(case)
    compare.check_result(case, inputs, expected, expected)
    for change in wrong:
        with pytest.raises(AssertionError):
            compare.check_result(case, inputs, change(expected), expected)


@pytest.mark.slow
def test_reference_equals_itself():
    support.check_case(cases.matmul(MODEL, "o_proj", 3), kernels="auto")
    support.check_case(cases.append(MODEL, 3), kernels="auto")


@pytest.mark.slow
def test_variants_are_calls_of_the_ops():
    for case in (
        variants.epilogue(3, 64, 352, 32, 96),
        variants.reordered_norm(3, 512),
        variants.reordered(3, 512),
        variants.one_scale("Llama-3-8B", 1, 1, 100, "post"),
        variants.one_scale("Llama-3-8B", 1, 5, 100, "pre"),
        variants.windowed("Llama-3-8B", 1, 1, 200, 70),
        variants.windowed("Llama-3-8B", 1, 5, 200, 70),
    ):
        support.check_case(case, kernels="auto")


def test_a_window_that_is_not_kept_is_noticed():
    for seq in (1, 5):
        case = variants.windowed(MODEL, 1, seq, 200, 70)
        inputs = case.inputs(jax.random.key(0))
        expected = case.function(*inputs)
        for window in (69, 71, 2**30):
            with pytest.raises(AssertionError):
                compare.check_result(case, inputs, case.function(*inputs[:-1], jnp.int32(window)), expected)


def test_norm_with_residual():
    rejects(
        variants.reordered_norm(3, 512),
        lambda result: (result[0], bump(result[1], (1, 5), 0.5)),
        lambda result: (dataclasses.replace(result[0], body=bump(result[0].body, (0, 0), 2)), result[1]),
    )


def test_matmul():
    rejects(
        cases.matmul(MODEL, "o_proj", 3),
        lambda y: bump(y, (1, 5), 0.2),
        lambda y: y.at[0, 0].set(jnp.nan),
        lambda y: y * 1.01,
        lambda y: y.astype(jnp.float32),
        lambda y: y[:, :-1],
    )


def test_quantized_activations():
    def change(name: str, **options: Any) -> Callable[[Any], Any]:
        return lambda x: dataclasses.replace(x, **{name: bump(getattr(x, name), (0, 0), **options)})

    rejects(cases.attention_output(MODEL, 4), change("body"), change("outliers"), change("scales", by=1e-6))
    rejects(cases.norm(MODEL, 4), change("body", by=2), change("outliers", by=-2), change("scales", by=1e-4))
    many = lambda x: dataclasses.replace(x, body=x.body.at[:, ::50].add(jnp.int8(1)))  # noqa: E731
    rejects(cases.silu(MODEL, 4), many)
    rejects(cases.silu(MODEL, 4, rotate=False), many)


def test_append():
    case = cases.append(MODEL, 4)
    inputs, _ = inputs_and_result(case)
    slot = int(inputs[3][0])
    page, offset = divmod(slot, cases.PAGE_SIZE)
    free = next(i for i in range(cases.PAGE_SIZE) if page * cases.PAGE_SIZE + i not in np.asarray(inputs[3]))

    def change(name: str, at: tuple[int, ...], by: float = 1) -> Callable[[Any], Any]:
        return lambda result: (
            result[0],
            dataclasses.replace(result[1], **{name: bump(getattr(result[1], name), at, by)}),
        )

    rejects(
        case,
        change("v_pages", (1, page, 0, offset, 3)),
        change("k_pages", (1, page, 0, offset, 3), 3),
        change("v_pages", (1, page, 0, free, 3)),
        change("k_pages", (0, page, 0, offset, 3)),
        change("k_scales", (1, page, 0, 0, offset), 0.1),
        change("v_scales", (1, page, 0, 0, offset), 0.01),
        change("k_scales", (1, page, 1, 2, free), 1),
        lambda result: (bump(result[0], (0, 0, 0), 0.5), result[1]),
    )


def test_attention():
    case = cases.attention(MODEL, 2, 1, 128)
    rejects(case, lambda y: y.at[0, 0, 0].set(0), lambda y: y * 1.02, lambda y: bump(y, (1, 0, 2, 3), 0.3))


def test_poison_leaves_nothing_behind():
    before = len(jax.live_arrays())
    execute.poison({"a": jnp.zeros((3, 5)), "b": None})
    assert len(jax.live_arrays()) <= before + 1


def clear_traces() -> None:
    """jit shall not find what it traced with another op."""
    test_model.step.cache_clear()
    jax.clear_caches()


def tiny_model() -> tuple[Any, Any]:
    config = test_model.without_rotation(gpu_generate.smoke_config("w4a4kv4"))
    return config, random_params(config, jax.random.key(0))


@pytest.mark.slow
def test_model_comparison_accepts_itself():
    config, params = tiny_model()
    found = test_model.compare_greedy(params, config, "reference", 2, 8, 3, "prompts")
    assert found == {"prefill": 0.0, "decode": 0.0, "differing": 0}


@pytest.mark.slow
def test_model_comparison_sees_a_wrong_op(monkeypatch: pytest.MonkeyPatch):
    """An attention whose heads are in the wrong order, in the kernels' place."""
    from pallas_kernels.paged_attention import reference  # prefill's reference calls it, too

    config, params = tiny_model()
    original, calls = reference.run, []

    def wrong(call, config=None):
        calls.append(call.q.shape)
        out = original(call)
        return -out[:, :, ::-1] if len(calls) % 2 else out

    clear_traces()
    monkeypatch.setattr(reference, "run", wrong)
    with pytest.raises(AssertionError, match=r"prefill at|decode at"):
        test_model.compare_greedy(params, config, "auto", 2, 8, 3, "prompts")
    clear_traces()


def test_close_calls():
    logits = np.array([[0.0, 3.0, 2.999, -4.0], [1.0, 0.0, -1.0, 0.5]])
    assert test_model.check_choice(np.array([1, 0]), logits, 0.04) == 0
    assert test_model.check_choice(np.array([2, 0]), logits, 0.04) == 1
    with pytest.raises(AssertionError, match="below the best"):
        test_model.check_choice(np.array([0, 0]), logits, 0.04)


def test_random_params_have_the_models_shapes():
    from atom_jax.checkpoint import abstract_params

    for scheme in ("w4a4kv4", "bf16"):
        config = gpu_generate.smoke_config(scheme)
        found = jax.eval_shape(lambda config=config: random_params(config, jax.random.key(0)))
        assert jax.tree.structure(found) == jax.tree.structure(abstract_params(config))
        wanted = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == wanted


@pytest.mark.slow
def test_generate_smoke(tmp_path: Path):
    out = tmp_path / "generate.json"
    assert gpu_generate.run(out, 1000, smoke=True)
    found = json.loads(out.read_text())["results"]
    assert [(row["scheme"], row["kind"]) for row in found["figures"]] == [
        (scheme, kind) for scheme in ("w4a4kv4", "bf16") for kind in ("decode", "prefill")
    ]
    assert all(row["tokens_per_second"] > 0 for row in found["figures"])
    assert found["figures"][0]["implementations"]["grouped_matmul"].startswith("native_cpu")
    assert len(found["ratios"]) == 2
