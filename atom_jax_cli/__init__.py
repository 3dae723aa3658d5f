"""The command line, ``atom-jax``.

It uses ``atom_jax`` and ``convert``, which never import it. Commands import transformers, the converter and
the server when they run, not before, so that ``--help`` and errors in options come soon.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from atom_jax_cli import (
    ablate,
    batch,
    compare,
    convert,
    demo,
    doctor,
    evaluate,
    explain,
    generate,
    inspect,
    serve,
)
from atom_jax_cli.console import ReportingCommand, ResumingCommand, prepare_process
from atom_jax_cli.hosts import leaving_a_failed_group, on_hosts

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert", cls=ResumingCommand)(convert.convert)
app.command("generate", cls=ReportingCommand)(on_hosts(generate.generate))
app.command("serve", cls=ReportingCommand)(on_hosts(serve.serve))
app.command("batch", cls=ResumingCommand)(on_hosts(batch.batch))
app.command("eval", cls=ReportingCommand)(on_hosts(evaluate.evaluate))
app.command("compare", cls=ReportingCommand)(compare.compare)
app.command("ablate", cls=ResumingCommand)(ablate.ablate)
app.command("inspect", cls=ReportingCommand)(inspect.inspect)
app.command("explain", cls=ReportingCommand)(explain.explain)
app.command("doctor", cls=ReportingCommand)(doctor.doctor)
app.command("demo", cls=ResumingCommand)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from atom_jax import __version__

        typer.echo(f"atom-jax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Llama-family models in JAX with 4-bit weights, activations and KV cache."""


def main() -> None:
    """The console script ``atom-jax`` and ``python -m atom_jax``."""
    # transformers warns at every start if there is no torch. Tokenizers do not need it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    prepare_process()
    with leaving_a_failed_group():
        app(prog_name="atom-jax")
