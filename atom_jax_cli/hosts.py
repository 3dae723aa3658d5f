"""Commands that can run on several hosts: their options, and what the processes that do not lead do."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atom_jax.errors import AtomError, one_line

if TYPE_CHECKING:
    from atom_jax.process_group import ProcessGroup

_PANEL, _DETECTED = "Several hosts", "the cluster's, or none"


def _options(
    coordinator_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Process 0, as all reach it, and a free port there.",
            show_default=_DETECTED,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(help="All run the same command.", min=1, show_default=_DETECTED, rich_help_panel=_PANEL),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            help="0 has the input and the output.",
            min=0,
            show_default=_DETECTED,
            rich_help_panel=_PANEL,
        ),
    ] = None,
) -> None:
    """The options that ``on_hosts`` adds."""


def on_hosts(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of ``jax.distributed``. Process 0 runs it, the others do what it publishes.

    Args:
      command: with a parameter ``checkpoint``, which is all that the other processes use of it.
    """
    own, added = (inspect.signature(function, eval_str=True) for function in (command, _options))

    @functools.wraps(command)
    def run(*, checkpoint: Path, **settings: Any) -> None:
        from atom_jax import distributed
        from atom_jax.compilation_cache import enable_compilation_cache
        from atom_jax.hosts import follow

        cluster = [settings.pop(name) for name in added.parameters]
        group = distributed.initialize(*cluster)
        if group is None:
            command(checkpoint=checkpoint, **settings)
            return
        _leave_standard_output_to_python()
        with _ending(group):
            if group.is_leader:
                command(checkpoint=checkpoint, **settings)
            else:
                # A cluster that ends sends SIGTERM to all. Process 0 may still have answers to complete.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                enable_compilation_cache()
                follow(group, checkpoint)

    parameters = [*own.parameters.values(), *added.parameters.values()]
    run.__signature__ = own.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@contextlib.contextmanager
def _ending(group: ProcessGroup) -> Iterator[None]:
    """Ends the group with the block, in order or with the block's failure."""
    import jax

    from atom_jax import distributed

    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            group.await_news()
        distributed.end(_reason(error))
        raise
    distributed.end()


@contextlib.contextmanager
def leaving_a_failed_group() -> Iterator[None]:
    """Ends the process at once after the block if its group has failed (``distributed.failed``)."""
    from atom_jax import distributed

    try:
        yield
    except BaseException as error:
        if not distributed.failed():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        status = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, typer.Exit):
        return f"exit status {error.exit_code}"
    return str(error) if isinstance(error, AtomError) else f"{type(error).__name__}: {one_line(error)}"


def _leave_standard_output_to_python() -> None:
    """What libraries print on standard output, as Gloo does, goes to standard error: the result is there."""
    sys.stdout.flush()
    result, terminal = os.dup(1), os.isatty(1)
    os.dup2(2, 1)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors or "strict"
    sys.stdout = open(result, "w", encoding=encoding, errors=errors, buffering=1 if terminal else -1)  # noqa: SIM115
