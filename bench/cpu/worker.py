"""One of the systems that are Python programs, as the process that ``protocol.py`` describes.

python -m bench.cpu.worker native CHECKPOINT        # what ``atom_jax.generate`` runs on this CPU by itself
python -m bench.cpu.worker reference CHECKPOINT     # the same with the reference of every op
python -m bench.cpu.worker float                    # Atom-JAX with float weights
python -m bench.cpu.worker transformers             # transformers' ``generate``, float32
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
import numpy as np
import typer

import atom_jax
from atom_jax.compilation_cache import enable_compilation_cache
from atom_jax.config import ModelConfig
from convert.demo.smollm2 import smollm2_gguf
from convert.float_model import load_float
from convert.sources import Source, open_source
from pallas_kernels import dispatch

# Continues tokens int32 [batch, prompt] by exactly so many new ones.
Generate = Callable[[np.ndarray, int], None]


def transformers_model(source: Source) -> Any:
    """The same model in transformers, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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


def run_transformers(model: Any) -> Generate:
    """Greedy generation with transformers."""
    import torch

    def run(tokens: np.ndarray, count: int) -> None:
        ids = torch.from_numpy(tokens).long()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

    return run


def run_atom(params: Any, config: ModelConfig) -> Generate:
    """Greedy generation with Atom-JAX: no token ends a row."""
    endless = config.replace(eos_token_ids=())

    def run(tokens: np.ndarray, count: int) -> None:
        lengths = np.full(tokens.shape[0], tokens.shape[1])
        jax.block_until_ready(
            atom_jax.generate(params, tokens, lengths, config=endless, max_new_tokens=count)
        )

    return run


def step_bytes(params: Any, config: ModelConfig) -> int:
    """Bytes of the parameters that one decode step reads: all but an embedding that is not the head too."""
    leaves = jax.tree.leaves(params)
    if not config.tie_word_embeddings:
        leaves = jax.tree.leaves({name: params[name] for name in params if name != "embedding"})
    return sum(leaf.nbytes for leaf in leaves)


def products(config: ModelConfig) -> dict[str, int]:
    """Multiplications of a weight that a token needs: in the layers' linears, and in the head."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + 3 * config.intermediate_size)
    return {"layers": config.num_layers * layer, "head": config.hidden_size * config.vocab_size}


def described(system: str, params: Any, config: ModelConfig) -> dict[str, Any]:
    """What an Atom-JAX system says of itself."""
    return {
        "runs": system,
        "scheme": config.format.scheme,
        "bytes_of_a_step": step_bytes(params, config),
        "products_of_a_token": products(config),
    }


def load(system: str, checkpoint: Path | None) -> tuple[Generate, dict[str, Any]]:
    """The system, and what it says of itself."""
    if (checkpoint is None) != (system in ("float", "transformers")):
        raise SystemExit(f"{system} {'needs a checkpoint' if checkpoint is None else 'takes no checkpoint'}")
    if checkpoint is not None:
        model = atom_jax.load(checkpoint)
        params, config = model.params, model.config
    elif system == "float":
        config, params = load_float(open_source(smollm2_gguf()))
    else:
        return run_transformers(transformers_model(open_source(smollm2_gguf()))), {}
    return run_atom(params, config), described(system, params, config)


def serve(generate: Generate, ready: dict[str, Any], answers: TextIO) -> None:
    """Answers requests until there are no more."""
    print(json.dumps({"ready": ready}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        tokens, count = np.asarray(request["prompts"], np.int32), request["new_tokens"]
        cpu, started = time.process_time(), time.perf_counter()
        generate(tokens, count)
        times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(times), file=answers, flush=True)


def main(system: str, checkpoint: Annotated[Path | None, typer.Argument()] = None) -> None:
    """Loads the system and answers requests."""
    if system not in ("native", "reference", "float", "transformers"):
        raise SystemExit(f"there is no system {system}")
    # What libraries print must not get among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    enable_compilation_cache()
    generate, ready = load(system, checkpoint)
    with dispatch.use_implementation("reference" if system == "reference" else dispatch.AUTO):
        serve(generate, ready, answers)


if __name__ == "__main__":
    typer.run(main)
