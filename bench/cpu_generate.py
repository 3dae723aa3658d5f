"""Decode speed on this CPU: SmolLM2 w4a4kv4 and float32 here, against transformers' float32 generate.

    python -m bench.cpu_generate CHECKPOINT

CHECKPOINT is a w4a4kv4 conversion of SmolLM2 (``atom-jax demo`` makes one). The systems take turns in one
process on the same cores. A figure is (time of FEW + N tokens - time of FEW tokens) / N, so the time of
prefill and dispatch is not in it. Each time is that of the fastest round, because other load on the machine
can only make a time longer. The times of all rounds are saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM

import atom_jax
from atom_jax.config import ModelConfig
from bench.record import environment, save
from convert.demo.smollm2 import smollm2_gguf
from convert.float_model import load_float
from convert.sources import Source, open_source

PROMPT_TOKENS = 32
# Above the smallest bucket of new tokens (16), so that FEW and FEW + N <= 64 run the same program.
FEW = 17


def transformers_model(source: Source) -> LlamaForCausalLM:
    """The same model in transformers, float32."""
    config = source.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    tensors = {name: torch.from_numpy(source.tensor(name)) for name in source.shapes}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"transformers' model differs: missing {missing}, unexpected {unexpected}")
    return model.eval()


def run_transformers(model: Any) -> Callable[[np.ndarray, int], None]:
    """A function that generates exactly ``count`` tokens greedily with transformers."""

    def run(tokens: np.ndarray, count: int) -> None:
        ids = torch.from_numpy(tokens).long()
        mask = torch.ones_like(ids)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

    return run


def run_atom(params: Any, config: ModelConfig) -> Callable[[np.ndarray, int], None]:
    """A function that generates exactly ``count`` tokens greedily with Atom-JAX: no token ends a row."""
    endless = config.replace(eos_token_ids=())

    def run(tokens: np.ndarray, count: int) -> None:
        lengths = np.full(tokens.shape[0], tokens.shape[1])
        jax.block_until_ready(
            atom_jax.generate(params, tokens, lengths, config=endless, max_new_tokens=count)
        )

    return run


def main(
    checkpoint: Path,
    new_tokens: Annotated[int, typer.Option(help="N, at most 47 (one compiled bucket)")] = 47,
    rounds: int = 7,
) -> None:
    """Measures, prints a table and saves bench/results/cpu_generate.json."""
    where = environment()
    source = open_source(smollm2_gguf())
    model = atom_jax.load(checkpoint)
    float_config, float_params = load_float(source)
    systems = {
        "transformers float32": run_transformers(transformers_model(source)),
        "atom-jax float32": run_atom(float_params, float_config),
        "atom-jax w4a4kv4": run_atom(model.params, model.config),
    }
    if not 1 <= new_tokens <= 64 - FEW:
        raise SystemExit(f"new tokens must be 1 to {64 - FEW}, found {new_tokens}")
    rows = []
    for batch in (1, 16):
        tokens = np.random.default_rng(0).integers(100, 40_000, (batch, PROMPT_TOKENS)).astype(np.int32)
        seconds: dict[str, dict[int, list[float]]] = {
            name: {FEW: [], FEW + new_tokens: []} for name in systems
        }
        for run in systems.values():  # compiles, and allocates all memory
            run(tokens, FEW)
        for _ in range(rounds):
            for name, run in systems.items():
                for count, times in seconds[name].items():
                    started = time.perf_counter()
                    run(tokens, count)
                    times.append(time.perf_counter() - started)
        steps = {
            name: (min(times[FEW + new_tokens]) - min(times[FEW])) / new_tokens
            for name, times in seconds.items()
        }
        baseline = steps["transformers float32"]
        for name, step in steps.items():
            rows.append(
                {
                    "batch": batch,
                    "system": name,
                    "ms_per_step": 1e3 * step,
                    "tokens_per_second": batch / step,
                    "ratio_to_transformers": baseline / step,
                    "seconds_of_rounds": seconds[name],
                }
            )
            print(
                f"batch {batch:2d}  {name:22s} {batch / step:8.1f} tok/s  {baseline / step:5.2f}x", flush=True
            )
    print(save("cpu_generate", where, rows))


if __name__ == "__main__":
    typer.run(main)
