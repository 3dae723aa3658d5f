"""Serving under load at a fixed memory budget: throughput and latency of each scheme, side by side.

    python -m bench.serving FLOAT W8A8 W4A4KV4 --memory-gb 0.29 --max-total 256    # converted checkpoints
    python -m bench.serving --shape llama-2-7b --memory-gb 24                 # random weights, on a GPU

The memory budget is for weights and cache: what the weights leave becomes cache pages. Sizes are those on a
GPU (bfloat16), also where a CPU computes in float32. All schemes answer the same requests, which arrive at
the same times. The time to the first token begins when a request arrives, so it includes the time in the
queue. The JSON file is rewritten after every measurement. ``python -m bench.serving_report`` makes the table
and the plot.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import atom_jax
from atom_jax.checkpoint import Model, abstract_params, read_config
from atom_jax.compilation_cache import enable_compilation_cache
from atom_jax.config import ModelConfig, preset
from atom_jax.engine import Engine, EngineConfig, RequestParams
from atom_jax.engine.runner import page_bytes
from bench import record
from bench.gpu.random_model import random_params
from bench.models import KNOWN_MODELS
from bench.workload import BenchRequest, Load, sharegpt, synthetic

OUT = record.RESULTS / "serving.json"
RANDOM_SCHEMES = ("bf16", "w4a4kv4")
_PERCENTILES = (50, 95, 99)
Result = dict[str, Any]


@dataclasses.dataclass
class _Times:
    """When a request arrived and got its first and its last token, in seconds after the start of the run.

    Attributes:
      gaps: seconds between each two tokens that follow each other.
    """

    arrived: float
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = dataclasses.field(default_factory=list)


def num_pages(config: ModelConfig, memory_bytes: float, page_size: int) -> int:
    """Number of cache pages for which ``memory_bytes`` has room beside the weights."""
    weights = weight_bytes(config, jnp.bfloat16)
    pages = int((memory_bytes - weights) // page_bytes(config, page_size, jnp.bfloat16))
    if pages < 1:
        raise SystemExit(f"{memory_bytes / 1e9:g} GB leave no page after {weights / 1e9:.2f} GB of weights")
    return pages


def weight_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of all parameters; ``dtype`` is the type of those that are not quantized."""
    leaves = jax.tree.leaves(abstract_params(config, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def drive(engine: Engine, requests: Sequence[BenchRequest], load: Load, arrivals: np.ndarray) -> Result:
    """Answers all requests and measures it: latencies in seconds, throughput in tokens per second.

    Args:
      engine: without unfinished requests.
      requests: in order of arrival.
      load: when they arrive.
      arrivals: from ``load.arrivals``.
    """
    before = engine.stats()
    waiting = collections.deque(range(len(requests)))
    times: dict[str, _Times] = {}
    finished = running = 0
    started = time.perf_counter()

    def elapsed() -> float:
        return time.perf_counter() - started

    def due() -> bool:
        if load.clients is not None:
            return len(times) - finished < load.clients
        return arrivals[waiting[0]] <= elapsed()

    while waiting or engine.has_work:
        while waiting and due():
            index = waiting.popleft()
            request = requests[index]
            arrived = elapsed() if load.clients is not None else float(arrivals[index])
            times[str(index)] = _Times(arrived)
            engine.add(
                str(index), request.prompt, RequestParams(max_new_tokens=request.new_tokens, ignore_eos=True)
            )
        if not engine.has_work:
            time.sleep(max(arrivals[waiting[0]] - elapsed(), 0))
            continue
        outputs = engine.step()
        running += engine.stats().running
        now = elapsed()
        for output in outputs:
            each = times[output.request_id]
            if each.first:
                each.gaps.append(now - each.last)
            each.first = each.first or now
            each.last = now
            finished += output.finish_reason is not None
    return _latency_and_throughput(requests, times, elapsed()) | _differences(engine, before, running)


def _latency_and_throughput(
    requests: Sequence[BenchRequest], times: dict[str, _Times], seconds: float
) -> Result:
    first = [each.first - each.arrived for each in times.values()]
    per_token = [
        (each.last - each.first) / (requests[int(index)].new_tokens - 1)
        for index, each in times.items()
        if requests[int(index)].new_tokens > 1
    ]
    return {
        "seconds": seconds,
        "tokens_per_second": sum(request.new_tokens for request in requests) / seconds,
        "requests_per_second": len(requests) / seconds,
        "ttft_seconds": _percentiles(first),
        "tpot_seconds": _percentiles(per_token),
        "gap_seconds": _gaps([gap for each in times.values() for gap in each.gaps]),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": float(v) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)}


def _gaps(gaps: list[float]) -> dict[str, float]:
    """How long a stream stands still: between all tokens of all requests, p99 and the worst."""
    return {"p99": float(np.percentile(gaps, 99)), "max": max(gaps)} if gaps else {}


def _differences(engine: Engine, before: Any, running: int) -> Result:
    after = engine.stats()
    steps = after.steps - before.steps
    return {
        "steps": steps,
        "mean_running": running / max(steps, 1),
        "preemptions": after.preemptions - before.preemptions,
        "host_share": (after.host_seconds - before.host_seconds)
        / max(after.step_seconds - before.step_seconds, 1e-9),
    }


def random_model(shape: str, scheme: str) -> Model:
    """A known model with random weights. The text of each token is its id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = KNOWN_MODELS[shape](preset(scheme))
    vocabulary = {str(token): token for token in range(config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    params = jax.block_until_ready(random_params(config, jax.random.key(0, impl="rbg")))
    model = Model(Path(shape), config, params)
    model.__dict__["tokenizer"] = PreTrainedTokenizerFast(
        tokenizer_object=words
    )  # takes the place of a tokenizer on disk
    return model


def measure_loads(
    model: Model, loads: Sequence[Load], requests: Sequence[BenchRequest], settings: EngineConfig
) -> Iterator[Result]:
    """Measures each load. All programs are compiled before the first."""
    engine = Engine(model, settings)
    engine.warm_up()
    labels = {
        "scheme": model.config.format.scheme,
        "weight_bytes": weight_bytes(model.config, jnp.bfloat16),
        "num_pages": settings.num_pages,
        "max_num_seqs": settings.max_num_seqs,
    }
    for load in loads:
        arrivals = load.arrivals(len(requests), np.random.default_rng(1))
        yield labels | {"load": str(load)} | drive(engine, requests, load, arrivals)


def line(row: Result) -> str:
    """A result for humans."""
    ttft, tpot = (row[key] for key in ("ttft_seconds", "tpot_seconds"))
    return (
        f"{row['scheme']:8s} {row['load']:>16s} {row['tokens_per_second']:8.1f} tokens/s, "
        f"{row['mean_running']:5.1f} running; ms p50/p95/p99: first token "
        f"{'/'.join(f'{1e3 * value:.0f}' for value in ttft.values())}, "
        f"each later one {'/'.join(f'{1e3 * value:.1f}' for value in tpot.values())}, "
        f"gap p99/max {'/'.join(f'{1e3 * value:.0f}' for value in row['gap_seconds'].values())}"
    )


def _models(
    checkpoints: list[Path], shape: str | None, schemes: str
) -> list[tuple[ModelConfig, Callable[[], Model]]]:
    """The configuration of each model to measure, and a function that loads it."""
    if bool(checkpoints) == bool(shape):
        raise SystemExit("give either converted checkpoints or --shape")
    if not shape:
        return [(read_config(path), functools.partial(atom_jax.load, path)) for path in checkpoints]
    if shape not in KNOWN_MODELS:
        raise SystemExit(f"unknown shape {shape!r}; there are {', '.join(KNOWN_MODELS)}")
    wanted = schemes.split(",")
    if unknown := set(wanted) - set(RANDOM_SCHEMES):
        raise SystemExit(
            f"no random weights for {', '.join(sorted(unknown))}; only {', '.join(RANDOM_SCHEMES)}"
        )
    return [
        (KNOWN_MODELS[shape](preset(scheme)), functools.partial(random_model, shape, scheme))
        for scheme in wanted
    ]


def main(
    checkpoints: Annotated[list[Path] | None, typer.Argument(help="One a scheme.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights of a known model instead.")] = None,
    schemes: Annotated[str, typer.Option(help="Of --shape.")] = "bf16,w4a4kv4",
    memory_gb: Annotated[float, typer.Option(help="Weights and cache together.")] = 24.0,
    rates: Annotated[str, typer.Option(help="Poisson arrivals, requests a second: 1,2,4")] = "",
    clients: Annotated[str, typer.Option(help="Closed loops: 1,8,64")] = "",
    requests: Annotated[int, typer.Option(help="Of each figure.")] = 256,
    max_total: Annotated[int, typer.Option(help="Most tokens of a prompt and its answer.")] = 2048,
    max_num_seqs: Annotated[int, typer.Option(help="Most answers at once, if the pages suffice.")] = 256,
    token_budget: Annotated[int, typer.Option(help="Of a step.")] = 512,
    max_decode_delay: Annotated[
        float, typer.Option(help="Of a token by prompts, in steps of decoding; inf: prompts go first.")
    ] = EngineConfig.max_decode_delay,
    page_size: int = 64,
    dataset: Annotated[Path | None, typer.Option(help="Conversations in ShareGPT's format.")] = None,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The result.")] = OUT,
) -> None:
    """Measures, prints and saves the JSON."""
    enable_compilation_cache()
    loads = [Load(rate=float(rate)) for rate in rates.split(",") if rate]
    loads += [Load(clients=int(count)) for count in clients.split(",") if count]
    loads = loads or [Load(clients=1), Load(clients=max_num_seqs)]
    where, rows = record.environment(), []
    asked = {"memory_gb": memory_gb, "requests": requests, "max_total": max_total, "seed": seed}
    asked |= {
        "dataset": dataset.name if dataset else None,
        "page_size": page_size,
        "token_budget": token_budget,
        "max_decode_delay": str(max_decode_delay),
    }
    models = _models(checkpoints or [], shape, schemes)
    pages = [
        num_pages(config, 1e9 * memory_gb, page_size) for config, _ in models
    ]  # a budget that is too small fails here
    for (config, load_model), count in zip(models, pages, strict=True):
        settings = EngineConfig(
            num_pages=count,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_total,
            token_budget=token_budget,
            max_decode_delay=max_decode_delay,
            prefix_caching=False,
        )
        model = load_model()
        rng = np.random.default_rng(seed)
        if dataset is None:
            work = synthetic(requests, max_total=max_total, vocab_size=config.vocab_size, rng=rng)
        else:
            encode = lambda text: model.tokenizer(text).input_ids  # noqa: B023, E731
            work = sharegpt(dataset, requests, max_total=max_total, encode=encode, rng=rng)
        for row in measure_loads(model, loads, work, settings):
            rows.append(row)
            print(line(row), flush=True)
            record.write_json(out, {"environment": where, "settings": asked, "results": rows})
        del model
        gc.collect()
    print(out)


if __name__ == "__main__":
    typer.run(main)
