"""Atom-JAX: Llama-family models in JAX with 4-bit weights, activations and KV cache; the public API."""

from atom_jax.checkpoint import Model, load
from atom_jax.config import Format, ModelConfig, RopeConfig, preset
from atom_jax.errors import AtomError
from atom_jax.fidelity import Comparison, Fidelity, compare, compare_texts
from atom_jax.generation import GenerateOutput, generate, stream
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward, make_params
from atom_jax.perplexity import PerplexityResult, perplexity
from atom_jax.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AtomError",
    "Comparison",
    "Fidelity",
    "Format",
    "GenerateOutput",
    "Model",
    "ModelConfig",
    "PerplexityResult",
    "RopeConfig",
    "SamplingParams",
    "compare",
    "compare_texts",
    "forward",
    "generate",
    "init_cache",
    "load",
    "make_params",
    "perplexity",
    "preset",
    "stream",
]
