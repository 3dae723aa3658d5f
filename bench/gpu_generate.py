"""Tokens per second of Llama-3-8B with random weights: w4a4kv4 against bfloat16, in the same code.

    python -m bench.gpu_generate            # one GPU
    python -m bench.gpu_generate --smoke    # two tiny layers with the reference, on any device

Decoding is one jitted loop of 64 greedy steps on sequences that have 1,024 tokens in the cache already. Its
time includes the start of the loop, which is less than one percent. Prefill is the last 512-token chunk of a
2,048-token prompt. The time depends neither on the values in the cache nor on those of the weights. XLA's
matmuls are those of cuBLAS. The JSON file is rewritten after every measurement.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from atom_jax.config import ModelConfig, preset
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from bench import record
from bench.gpu import progress
from bench.gpu.random_model import random_params
from bench.kernels import describe_error
from bench.models import llama_3_8b
from pallas_kernels import dispatch
from pallas_kernels.verification.execute import device_lost

# One measurement: its labels, and the function that makes it.
Figure = tuple[dict[str, Any], Callable[[], dict[str, Any]]]
TIMED_SCHEMES = ("w4a4kv4", "bf16")
_GENERATE_COMPILER_OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True)
class BenchSizes:
    """The sizes that are measured.

    Attributes:
      context: tokens in the cache when decoding begins.
      steps: number of steps of the decoding loop.
      batches: numbers of sequences to decode, the most valuable measurement first.
      prefills: (sequences, tokens of the chunk, tokens of the prompt) of each measurement of prefill.
      rounds: number of repetitions, of which the fastest counts.
    """

    context: int = 1024
    steps: int = 64
    batches: tuple[int, ...] = (64, 1, 16, 128)
    prefills: tuple[tuple[int, int, int], ...] = ((1, 512, 2048), (8, 512, 2048))
    rounds: int = 3


SMOKE = BenchSizes(context=32, steps=2, batches=(2,), prefills=((1, 16, 32),), rounds=1)


def smoke_config(scheme: str) -> ModelConfig:
    """Two layers that a CPU runs in a moment."""
    groups = {"group_size": 32, "num_outliers": 32} if scheme != "bf16" else {}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = llama_3_8b(preset(scheme, **groups))
    return config.replace(vocab_size=128, num_layers=2, **sizes)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of ``tree``."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def decode_loop(config: ModelConfig) -> Callable[..., Any]:
    """A function ``loop(params, token, cache, first, steps)``: greedy steps from position ``first`` on."""

    def loop(params: Any, token: Any, cache: Any, first: Any, steps: Any) -> Any:
        def body(i: Any, carry: Any) -> Any:
            token, cache = carry
            positions = jnp.full_like(token, first + i)
            logits, cache = forward(params, token, positions, cache, config=config)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, steps, body, (token, cache))

    return loop


def fastest(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` runs, each until its results are complete."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    return min(times)


def choices_of(lower: Callable[[], Any]) -> tuple[Any, dict[str, str]]:
    """What ``lower`` returns, and the implementation of each op it traced, with the reason."""
    with dispatch.record_choices() as choices:
        lowered = lower()
    return lowered, {choice.op: f"{choice.implementation} ({choice.reason})" for choice in choices}


def measure_decode(params: Any, config: ModelConfig, batch: int, bench_sizes: BenchSizes) -> dict[str, Any]:
    """Milliseconds of a step and tokens per second."""
    cache = init_cache(config, batch, bench_sizes.context + bench_sizes.steps)
    token = jnp.zeros((batch, 1), jnp.int32)
    first, steps = np.int32(bench_sizes.context), np.int32(bench_sizes.steps)
    jitted = jax.jit(decode_loop(config), donate_argnums=(2,))
    lowered, choices = choices_of(lambda: jitted.lower(params, token, cache, first, steps))
    compiled = lowered.compile(compiler_options=_GENERATE_COMPILER_OPTIONS)
    row = {"implementations": choices, "cache_bytes": tree_bytes(cache)}

    def run() -> Any:
        nonlocal cache
        result, cache = compiled(params, token, cache, first, steps)
        return result

    jax.block_until_ready(run())
    step = fastest(run, bench_sizes.rounds) / bench_sizes.steps
    return row | {"ms_per_step": 1e3 * step, "tokens_per_second": batch / step}


def measure_prefill(
    params: Any, config: ModelConfig, batch: int, chunk: int, prompt: int, bench_sizes: BenchSizes
) -> dict[str, Any]:
    """Milliseconds of a chunk and tokens per second."""
    cache = init_cache(config, batch, prompt)
    tokens = jnp.zeros((batch, chunk), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(prompt - chunk, prompt, dtype=jnp.int32), (batch, chunk))
    select = jnp.full((batch, 1), chunk - 1, jnp.int32)

    def step(params: Any, tokens: Any, positions: Any, cache: Any, select: Any) -> Any:
        return forward(params, tokens, positions, cache, config=config, select=select)

    jitted = jax.jit(step, donate_argnums=(3,))
    lowered, choices = choices_of(lambda: jitted.lower(params, tokens, positions, cache, select))
    compiled = lowered.compile(compiler_options=_GENERATE_COMPILER_OPTIONS)

    def run(times: int = 4) -> Any:
        nonlocal cache
        logits = None
        for _ in range(times):
            logits, cache = compiled(params, tokens, positions, cache, select)
        return logits

    jax.block_until_ready(run(1))
    seconds = fastest(run, bench_sizes.rounds) / 4
    return {
        "implementations": choices,
        "ms_per_chunk": 1e3 * seconds,
        "tokens_per_second": batch * chunk / seconds,
    }


def run(out: Path, budget: float, *, smoke: bool = False) -> bool:
    """Measures as much as can be begun within ``budget`` seconds; returns False if anything failed."""
    deadline = time.monotonic() + budget
    bench_sizes = SMOKE if smoke else BenchSizes()
    rows: list[dict[str, Any]] = []
    result = {"plan": dataclasses.asdict(bench_sizes), "figures": rows, "skipped": []}
    environment = record.environment()
    record.write_json(out, {"environment": environment, "results": result})
    for number, scheme in enumerate(TIMED_SCHEMES):
        config = smoke_config(scheme) if smoke else llama_3_8b(preset(scheme))
        # The first scheme must leave time for the second, because only the comparison is of interest.
        end = deadline - (len(TIMED_SCHEMES) - 1 - number) * budget / len(TIMED_SCHEMES)
        started = time.monotonic()
        params = jax.block_until_ready(random_params(config, jax.random.key(0, impl="rbg")))
        setup = {
            "scheme": scheme,
            "params_bytes": tree_bytes(params),
            "init_seconds": time.monotonic() - started,
        }
        decodes: list[Figure] = [
            ({"kind": "decode", "batch": batch}, partial(measure_decode, params, config, batch, bench_sizes))
            for batch in bench_sizes.batches
        ]
        prefills: list[Figure] = [
            (
                {"kind": "prefill", "batch": batch, "chunk": chunk, "prompt": prompt},
                partial(measure_prefill, params, config, batch, chunk, prompt, bench_sizes),
            )
            for batch, chunk, prompt in bench_sizes.prefills
        ]
        # Two batches of decoding and one prefill come first, in case the time is over before the rest.
        for what, measure in (*decodes[:2], *prefills[:1], *decodes[2:], *prefills[1:]):
            row: dict[str, Any] = setup | what
            if time.monotonic() > end:
                result["skipped"].append(row)
                continue
            try:
                row |= measure()
                print(f"{scheme:8s} {what}: {row['tokens_per_second']:.0f} tokens/s", flush=True)
            except Exception as error:  # e.g. out of memory: the next measurement may need less
                row["error"] = describe_error(error)
                print(f"{scheme:8s} {what}: FAILED {row['error'][:100]}", flush=True)
            rows.append(row)
            record.write_json(out, {"environment": environment, "results": result | {"ratios": ratios(rows)}})
            if "error" in row and device_lost():
                raise typer.Exit(progress.DEVICE_LOST)
            gc.collect()
        del params, decodes, prefills, measure
        gc.collect()
    record.write_json(out, {"environment": environment, "results": result | {"ratios": ratios(rows)}})
    for ratio in ratios(rows):
        print(f"{ratio['what']}: {ratio['w4a4kv4_over_bf16']:.2f}x of bf16")
    return not any("error" in row for row in rows)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens per second of w4a4kv4 divided by those of bf16, where both were measured."""
    measured = [row for row in rows if "tokens_per_second" in row]
    label = lambda row: f"{row['kind']} batch {row['batch']}"  # noqa: E731
    speeds = {(label(row), row["scheme"]): row["tokens_per_second"] for row in measured}
    return [
        {"what": what, "w4a4kv4_over_bf16": speed / speeds[what, "bf16"]}
        for (what, scheme), speed in speeds.items()
        if scheme == "w4a4kv4" and (what, "bf16") in speeds
    ]


def main(
    smoke: Annotated[bool, typer.Option(help="A tiny model with the reference, on any device.")] = False,
    seconds: Annotated[float, typer.Option(help="After this no new figure is begun.")] = 100.0,
    out: Annotated[Path | None, typer.Option(help="The result; by default of this GPU's folder.")] = None,
) -> None:
    """Measures, prints and writes the JSON."""
    if not smoke and jax.default_backend() != "gpu":
        print(f"bench.gpu_generate needs a CUDA GPU; JAX {jax.__version__} runs on {jax.default_backend()}")
        raise typer.Exit(2)
    out = out or record.gpu_results(jax.devices()[0].device_kind) / "generate.json"
    if not run(out, seconds, smoke=smoke):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
