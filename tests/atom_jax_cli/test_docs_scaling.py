"""The commands of docs/scaling.md: those for one model on several devices run, all others are parsed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from atom_jax_cli import app
from tests.atom_jax.command import PROMPT, ROOT, TEXT, run
from tests.atom_jax.sharded_models import sharded_config, write_sharded

_PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def commands(section: str = "") -> list[list[str]]:
    """The ``atom-jax`` commands of a section, or of the whole page, as lists of arguments."""
    text = _PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0] if section else _PAGE
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("atom-jax ")]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_are_parsed(arguments: list[str]) -> None:
    """Every option of the page is one of the command's, with a value of its type."""
    group = typer.main.get_command(app)
    with group.make_context("atom-jax", [arguments[0]], resilient_parsing=True) as context:
        command = group.get_command(context, arguments[0])  # type: ignore[attr-defined]
        assert command is not None
        command.make_context(arguments[0], arguments[1:], parent=context).close()


@pytest.mark.slow
def test_commands_for_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_sharded(tmp_path / "llama-w4a4kv4", sharded_config("w4a4kv4", 8, vocab_size=300))
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    body = {"model": "llama-w4a4kv4", "prompt": PROMPT, "max_tokens": 3}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(request) + "\n")
    ran = set()
    for name, *arguments in commands("One model on several GPUs"):
        if name in ("convert", "serve"):  # of a model that is not here; until it is ended
            continue
        small = {"generate": ["--max-new-tokens", "3"], "eval": ["--max-tokens", "40", "--seq-len", "32"]}
        sizes = {"batch": ["--max-num-seqs", "2", "--token-budget", "128", "--max-model-len", "64"]}
        run(name, *arguments, *(small | sizes)[name])
        ran.add(name)
    assert ran == {"generate", "batch", "eval"}
    (result,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(result)["response"]["status_code"] == 200
