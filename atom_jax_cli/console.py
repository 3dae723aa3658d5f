"""What every command shares: results on stdout, everything for humans on stderr, errors as one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typer.core import TyperCommand

from atom_jax.errors import AtomError
from atom_jax.progress import StageProgress

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# Where there is no terminal, a stage that takes longer than this says how far it is.
LOG_SECONDS = 10.0

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

stderr = Console(stderr=True)
stdout = Console()


def prepare_process() -> None:
    """What a process of the command line needs before it runs a command. For entry points."""
    for stream in (sys.stdout, sys.stderr):
        # Whatever the encoding of the terminal or the file lacks is written as its code, not as an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Python's own handler is not there where the signal is ignored, as in the background of a shell.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """The first Ctrl-C ends the command in order; another one does not wait for that."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    stderr.show_cursor()
    os._exit(EXIT_INTERRUPTED)


class ReportingCommand(TyperCommand):
    """Turns what a user can cause into one line ``error: ...`` and status 2; a bug keeps its traceback.

    Ctrl-C is one line, too, and status 130.
    """

    interrupted = "interrupted"

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note(self.interrupted)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our output is gone (`| head`): typer ends quietly
        except AtomError as error:
            message = str(error)
        except OSError as error:
            message = _os_error(error)
        except MemoryError:
            message = "out of memory"
        except Exception as error:
            # By name and text: an error must not cost the seconds that importing JAX takes.
            if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = f"out of memory: {str(error).splitlines()[0]}"
        fail(message)


class ResumingCommand(ReportingCommand):
    """A command that keeps on disk what it has done so far."""

    interrupted = "interrupted; the same command goes on where this one stopped"


def fail(message: str) -> NoReturn:
    """Prints ``error: message`` as one line on stderr and ends the command with status 2."""
    line = f"error: {' '.join(message.split())}"
    stderr.print(line, markup=False, highlight=False, soft_wrap=True, style="red")
    raise typer.Exit(EXIT_ERROR)


def _os_error(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{' -> '.join(names)}: {reason}" if names else reason


def print_json(data: dict[str, Any]) -> None:
    """The result of a command for machines: one object, on stdout."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)  # JSON has its own way to write any character in ASCII
    sys.stdout.write(f"{text}\n")


def note(message: str) -> None:
    """A line for humans, on stderr."""
    stderr.print(message, markup=False, highlight=False, soft_wrap=True, style="dim")


@contextlib.contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Draws one bar a stage on stderr while the block runs.

    In a log, a line when a stage is done, and some lines about one that takes longer.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    live = stderr.is_terminal
    progress = Progress(*columns, console=stderr)
    tasks: dict[str, TaskID] = {}
    last_report = last_line = progress.get_time()

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last_report, last_line
        if stage not in tasks:
            if live:
                progress.start()  # not earlier: bars that never come would leave an empty line
            for earlier in tasks.values():
                progress.stop_task(earlier)
            tasks[stage] = progress.add_task(stage)
            # The first report of a stage comes when some of it, and its compilation, is done already.
            progress.tasks[-1].start_time = last_report
        progress.update(tasks[stage], completed=done, total=total)
        last_report = progress.get_time()
        if not live and (done == total or last_report - last_line >= LOG_SECONDS):
            elapsed = f"{progress.tasks[-1].elapsed or 0:.1f} s"
            note(f"{stage}: {elapsed}" if done == total else f"{stage}: {done} of {total}, {elapsed}")
            last_line = last_report

    try:
        yield report
    finally:
        if live and tasks:
            progress.stop()


def format_bytes(count: int) -> str:
    """``count`` with a decimal unit: 93.2 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
