"""The tiny checkpoint of the tests of ``atom_jax``, for those of the command line."""

from tests.atom_jax.conftest import checkpoint, original, text, tokenizer

__all__ = ["checkpoint", "original", "text", "tokenizer"]
