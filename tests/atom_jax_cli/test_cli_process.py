"""What a process of the command line meets outside its options: encodings of the output, and Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atom_jax_cli import main
from tests.atom_jax.command import ROOT


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """``run_main(encoding, *args)``: the program with standard streams of this encoding."""
    handler = signal.getsignal(signal.SIGINT)

    def run(encoding: str, *args: object) -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["atom-jax", *map(str, args)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = (_written(stream) for stream in streams)
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    yield run
    signal.signal(signal.SIGINT, handler)


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode(stream.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
class TestEncodings:
    PROMPT = "Zürich → 東京"

    def test_text(self, encoding, run_main, checkpoint):
        """Two prompts, because those of a batch are printed, too."""
        prompts = ("--prompt", self.PROMPT, "--prompt", "the tin")
        status, out, err = run_main(encoding, "generate", checkpoint, *prompts, "--max-new-tokens", 8)
        assert (status, "Traceback" in err) == (0, False)
        expected = self.PROMPT.encode(encoding, "backslashreplace").decode(encoding)
        assert expected in out

    def test_json_is_exact(self, encoding, run_main, checkpoint):
        arguments = ("generate", checkpoint, "--prompt", self.PROMPT, "--max-new-tokens", 8, "--json")
        status, out, _ = run_main(encoding, *arguments)
        assert status == 0
        assert json.loads(out)["results"][0]["prompt"] == self.PROMPT

    @pytest.mark.parametrize("command", ["inspect", "explain", "eval", "compare", "help"])
    def test_tables(self, encoding, command, run_main, checkpoint, text):
        arguments = {
            "inspect": ("inspect", checkpoint),
            "explain": ("explain", checkpoint),
            "eval": ("eval", checkpoint, "--text", text, "--seq-len", 64),
            "compare": ("compare", checkpoint, checkpoint, "--text", text, "--seq-len", 64),
            "help": ("convert", "--help"),
        }[command]
        status, out, err = run_main(encoding, *arguments)
        assert (status, "Traceback" in err) == (0, False), err
        assert out

    def test_errors(self, encoding, run_main, tmp_path):
        status, out, err = run_main(encoding, "inspect", tmp_path / "東京")
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert "東京".encode(encoding, "backslashreplace").decode(encoding) in line


_WAITING = """
import atom_jax, os, signal, sys, threading
from atom_jax_cli import main

def wait(*args, **kwargs):
    # A thread that the program waits for when it ends, as those that write checkpoints are.
    threading.Thread(target=threading.Event().wait).start()
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
atom_jax.load = wait
import convert.pipeline
convert.pipeline.convert = wait
sys.argv[1:] = {arguments}
main()
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "CKPT", "--prompt", "a"], "interrupted"),
        (
            ["convert", "SRC", "OUT", "--scheme", "bf16"],
            "interrupted; the same command goes on where this one stopped",
        ),
    ],
)
def test_a_second_interrupt_ends_the_process(arguments: list[str], says: str, tmp_path: Path) -> None:
    """The first one is a line; another while the process waits for its threads adds nothing."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING.format(arguments=arguments)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate()
    assert (process.returncode, out, first + rest) == (130, "", f"{says}\n")
