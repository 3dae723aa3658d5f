"""What all commands share: results on stdout, other text for humans on stderr, errors as one line."""

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

# Without a terminal, a stage prints how far it is after every so many seconds.
LOG_SECONDS = 10.0

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

stderr = Console(stderr=True)
stdout = Console()


def prepare_process() -> None:
    """Sets up the process: encoding errors, Ctrl-C. Entry points call it before they run a command."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the encoding of the terminal or file does not have is written as its code.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Where the signal is ignored, as for a shell's background process, Python has no handler: keep it so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """The first Ctrl-C raises KeyboardInterrupt and the command can clean up; a second ends it at once."""
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    stderr.show_cursor()
    os._exit(EXIT_INTERRUPTED)


class ReportingCommand(TyperCommand):
    """A command that reports errors which a user can cause as one line ``error: ...``, with status 2.

    Other exceptions are bugs and keep their traceback. After Ctrl-C there is one line, too, and status 130.
    """

    interrupted = "interrupted"

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            note(self.interrupted)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise  # whoever reads our output has closed it (`| head`): typer ends the command quietly
        except AtomError as error:
            message = str(error)
        except OSError as error:
            message = _os_error(error)
        except MemoryError:
            message = "out of memory"
        except Exception as error:
            # The class is compared by name, because importing JAX for it would take seconds.
            if type(error).__name__ != "JaxRuntimeError" or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            message = f"out of memory: {str(error).splitlines()[0]}"
        fail(message)


class ResumingCommand(ReportingCommand):
    """A command that stores its progress on disk and continues there when it is run again."""

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
        text = json.dumps(data, indent=2)  # ASCII, with other characters as \uXXXX
    sys.stdout.write(f"{text}\n")


def note(message: str) -> None:
    """A line for humans, on stderr."""
    stderr.print(message, markup=False, highlight=False, soft_wrap=True, style="dim")


@contextlib.contextmanager
def progress_bars() -> Iterator[StageProgress]:
    """Shows the progress of stages on stderr while the block runs.

    On a terminal each stage has a bar. Elsewhere, e.g. in a log, it is a line at the end of each stage, and
    one every ``LOG_SECONDS`` before that.
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
                progress.start()  # not earlier: without any bar it would leave an empty line
            for earlier in tasks.values():
                progress.stop_task(earlier)
            tasks[stage] = progress.add_task(stage)
            # The stage began earlier: its first report comes when a part of it is done already.
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
