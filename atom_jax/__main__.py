"""Runs the command line ``atom-jax`` as ``python -m atom_jax``."""

from atom_jax_cli import main

main()
