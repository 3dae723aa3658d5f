"""``python -m convert SRC OUT`` is ``atom-jax convert SRC OUT``."""

import typer

from atom_jax.cli.console import ReportingCommand
from atom_jax.cli.convert import convert

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(cls=ReportingCommand)(convert)

if __name__ == "__main__":
    app(prog_name="python -m convert")
