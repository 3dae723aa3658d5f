"""Running the command line in tests."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from atom_jax_cli import app

ROOT = Path(__file__).parents[2]
TEXT = "the thin ant in the tin 12 and the inn at 1212 in a hut. " * 12
PROMPT = "the tin"


def run(*args, status=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == status, result.output
    return result


def run_json(*args):
    """The object on stdout, which holds nothing else."""
    return json.loads(run(*args, "--json").stdout)


def fails(*args, parts):
    """The command ends with status 2 and one line on stderr that has all ``parts``; stdout stays empty."""
    result = run(*args, status=2)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    for part in parts:
        assert str(part) in lines[-1], result.stderr
    return lines


def subprocess_run(*args, module="atom_jax", **options):
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)
