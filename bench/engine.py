"""The serving engine on this machine: unhidden host time, continuous batching, and the prefix cache.

    python -m bench.engine CHECKPOINT

Measures three figures, each with a target for SmolLM2 w4a4kv4 on 2 CPU cores:

* the host time that the device waits for, as a share of a decode step of 32 sequences;
* the throughput of 16 requests at the same time, divided by that of one request after the other;
* the time to the first token of a prompt of 1,000 tokens, divided by that of the same prompt sent again.

The figures are those of the fastest round, because other load on the machine can only make a time longer. The
times of all rounds are saved.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import atom_jax
from atom_jax.compilation_cache import enable_compilation_cache
from atom_jax.engine import Engine, EngineConfig, RequestParams
from bench.record import environment, save

SIZES = EngineConfig(max_num_seqs=32, max_model_len=1024)
DECODE_BATCH = 32
STEPS = 16
CONCURRENT = 16
ONE_BY_ONE = 4
PROMPT_TOKENS = 32
NEW_TOKENS = 64
LONG_PROMPT = 1000


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids: no two prompts begin with the same tokens, so the prefix cache finds nothing."""
    return np.random.default_rng().integers(100, 40_000, (count, length)).tolist()


def params(new_tokens: int) -> RequestParams:
    return RequestParams(max_new_tokens=new_tokens, ignore_eos=True)


def decode_steps(engine: Engine) -> dict[str, float]:
    """Milliseconds of a decode step of DECODE_BATCH sequences.

    Returns:
      "step": the whole step. "unhidden": the part during which the device waited for the host, as the engine
      counts it. "host_cpu": CPU time of the engine's thread; the device does not wait for it, but both share
      the cores.
    """
    for number, prompt in enumerate(random_prompts(DECODE_BATCH, PROMPT_TOKENS)):
        engine.add(str(number), prompt, params(NEW_TOKENS))
    started: set[str] = set()
    while len(started) < DECODE_BATCH:
        started |= {output.request_id for output in engine.step()}
    engine.step()  # dispatches the first step that decodes all sequences and prefills nothing
    unhidden, wall, cpu = engine.stats().host_seconds, time.perf_counter(), time.thread_time()
    for _ in range(STEPS):
        engine.step()
    times = {
        "step": time.perf_counter() - wall,
        "unhidden": engine.stats().host_seconds - unhidden,
        "host_cpu": time.thread_time() - cpu,
    }
    if engine.stats().running != DECODE_BATCH:
        raise SystemExit("a sequence ended while steps were timed")
    for number in range(DECODE_BATCH):
        engine.abort(str(number))
    while engine.has_work:
        engine.step()
    return {name: 1e3 * seconds / STEPS for name, seconds in times.items()}


def seconds_to_answer(engine: Engine, count: int, at_once: bool) -> float:
    """Seconds to answer ``count`` prompts, all at once or one after the other."""
    prompts = random_prompts(count, PROMPT_TOKENS)
    began = time.perf_counter()
    for batch in [prompts] if at_once else [[prompt] for prompt in prompts]:
        engine.generate(batch, params(NEW_TOKENS))
    return time.perf_counter() - began


def seconds_to_first_token(engine: Engine, prompt: list[int]) -> float:
    began = time.perf_counter()
    engine.add("long", prompt, params(1))
    while not engine.step():
        pass
    return time.perf_counter() - began


def row(name: str, target: str, value: float, met: bool, **rounds: Any) -> dict[str, Any]:
    """A line of the table, printed and saved."""
    print(
        f"{name:58s} target {target:>6s}   measured {value:8.3f}   {'met' if met else 'NOT MET'}", flush=True
    )
    return {"figure": name, "target": target, "value": value, "met": met, **rounds}


def main(checkpoint: Path, rounds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Measures, prints the figures and saves bench/results/engine.json."""
    enable_compilation_cache()
    where = environment()
    engine = Engine(atom_jax.load(checkpoint), SIZES)
    began = time.perf_counter()
    engine.warm_up()
    warm_up = time.perf_counter() - began
    print(f"warm-up {warm_up:.1f} s", flush=True)

    steps, batched, single, first, again = [], [], [], [], []
    for _ in range(rounds):
        steps.append(decode_steps(engine))
        batched.append(seconds_to_answer(engine, CONCURRENT, at_once=True))
        single.append(seconds_to_answer(engine, ONE_BY_ONE, at_once=False))
        (prompt,) = random_prompts(1, LONG_PROMPT)
        first.append(seconds_to_first_token(engine, prompt))
        again.append(seconds_to_first_token(engine, prompt))

    unhidden = min(times["unhidden"] for times in steps) / min(times["step"] for times in steps)
    batching = (CONCURRENT / min(batched)) / (ONE_BY_ONE / min(single))
    prefix = min(first) / min(again)
    results = [
        row(
            f"unhidden host time / decode step of {DECODE_BATCH}",
            "< 5%",
            100 * unhidden,
            unhidden < 0.05,
            ms=steps,
        ),
        row(
            f"throughput, {CONCURRENT} requests at once / one by one",
            ">= 3",
            batching,
            batching >= 3,
            at_once_tokens_per_second=CONCURRENT * NEW_TOKENS / min(batched),
            one_by_one_tokens_per_second=ONE_BY_ONE * NEW_TOKENS / min(single),
            seconds_at_once=batched,
            seconds_one_by_one=single,
        ),
        row(
            f"time to first token, {LONG_PROMPT} tokens, new / repeated",
            ">= 5",
            prefix,
            prefix >= 5,
            seconds_new=first,
            seconds_repeated=again,
        ),
    ]
    print(save("engine", where, {"warm_up_seconds": warm_up, "figures": results}))


if __name__ == "__main__":
    typer.run(main)
