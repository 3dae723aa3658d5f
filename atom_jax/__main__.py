"""``python -m atom_jax`` is the command line ``atom-jax``."""

from atom_jax.cli import main

main()
