"""Runs ``atom-jax convert SRC OUT`` as ``python -m convert SRC OUT``."""

import typer

from atom_jax_cli.console import ResumingCommand, prepare_process
from atom_jax_cli.convert import convert

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=ResumingCommand)(convert)

if __name__ == "__main__":
    prepare_process()
    app(prog_name="python -m convert")
