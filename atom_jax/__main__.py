"""``python -m atom_jax`` is the command line ``atom-jax``."""

from atom_jax_cli import main

main()
