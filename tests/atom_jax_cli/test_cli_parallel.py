"""``--tensor-parallel``: the same answers as on one device, and errors that say what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.atom_jax.command import PROMPT, fails, run, run_json
from tests.atom_jax.sharded_models import sharded_config, write_sharded

SIZES = ("--max-num-seqs", 2, "--max-model-len", 64, "--token-budget", 128)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("sharded"), sharded_config("w4a4kv4", 2, vocab_size=300))


def test_generate(sharded: Path) -> None:
    arguments = ("generate", sharded, PROMPT, "--max-new-tokens", 6)
    alone = run_json(*arguments)["results"]
    assert run_json(*arguments, "--tensor-parallel", 2)["results"] == alone


def test_eval(sharded: Path, text: Path) -> None:
    arguments = ("eval", sharded, "--text", text, "--seq-len", 32, "--max-tokens", 64)
    alone = run_json(*arguments)["perplexity"]
    assert run_json(*arguments, "--tensor-parallel", 2)["perplexity"] == alone


def test_batch(sharded: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 5, "seed": 7}
    line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": body}
    requests.write_text(json.dumps(line) + "\n")
    texts = []
    for devices in (1, 2):
        out = tmp_path / f"{devices}.jsonl"
        options = ("--model-name", "tiny", "--tensor-parallel", devices, *SIZES)
        shown = run("batch", sharded, requests, out, *options).stderr
        assert ("on each of 2 devices" in shown) == (devices == 2)
        texts.append(json.loads(out.read_text())["response"]["body"]["choices"])
    assert texts[0] == texts[1]


def test_explain_shows_what_one_device_runs(sharded: Path) -> None:
    """A part has half of the rows of gate and up."""
    shapes = [
        {line["shape"] for line in run_json("explain", sharded, *options)["decode"]}
        for options in ((), ("--tensor-parallel", 2))
    ]
    assert any("1024" in shape for shape in shapes[0]) and not any("1024" in shape for shape in shapes[1])


def test_errors(sharded: Path, checkpoint: Path) -> None:
    fails("generate", sharded, PROMPT, "--tensor-parallel", 4, parts=["2 shards", "4 devices", "--shards 4"])
    fails("generate", checkpoint, PROMPT, "--tensor-parallel", 2, parts=["1 shards", "--shards 2"])
    fails("generate", sharded, PROMPT, "--tensor-parallel", 99, parts=["99 devices wanted, found 8"])
