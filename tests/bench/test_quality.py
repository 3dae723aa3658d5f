"""bench.quality on tiny checkpoints, and the tables of bench.quality_report from tiny results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atom_jax.checkpoint import CARD_FILE, load
from atom_jax.fidelity import compare
from atom_jax.text import encode
from bench import quality, quality_report
from convert.card import read_card, write_card
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.texts import evaluation_texts
from convert.texts.questions import Question, ask
from tests.convert.jobs import save_text, tiny_options
from tests.convert.tiny import save_tiny

TEXTS = ["prose", "code", "dialogue", "lists", "french"]
QUESTIONS = [Question("a", "the ant?", ("ant", "insect")), Question("b", "the inn?", ("inn",))]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny model in float, in INT8 and in INT4; another model in float."""
    folder = tmp_path_factory.mktemp("quality")
    source, text = save_tiny(folder / "source"), save_text(folder / "text.txt")
    convert(source, folder / "float", ConvertOptions(make_recipe("bf16")))
    for name, recipe in (
        ("w8a8", make_recipe("w8a8")),
        ("w4a16", make_recipe("w4a16", group_size=32, gptq=False)),
    ):
        convert(source, folder / name, tiny_options(text, recipe=recipe, calibration_tokens=256))
    convert(save_tiny(folder / "b", seed=1), folder / "other", ConvertOptions(make_recipe("bf16")))
    return {name: folder / name for name in ("float", "w8a8", "w4a16", "other")}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are saved; few questions are asked."""
    monkeypatch.setattr(quality, "FILE", tmp_path / "quality.json")
    monkeypatch.setattr(quality, "load_questions", lambda: QUESTIONS)
    return quality.FILE


def run(checkpoints: Mapping[str, Path], *names: str, max_tokens: int = 150, keep: bool = True) -> None:
    folders = [f"{name}={checkpoints[name]}" for name in names]
    quality.main(checkpoints["float"], folders, seq_len=64, max_tokens=max_tokens, keep=keep)


def test_rows_are_measured_and_merged(
    checkpoints: Mapping[str, Path],
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ATOM_JAX_COMMIT", "first")
    run(checkpoints, "w8a8", keep=False)
    assert not file.exists()
    run(checkpoints, "w8a8", "w4a16")
    first = json.loads(file.read_text())["checkpoints"]
    assert list(first) == ["w8a8", "w4a16"]
    assert first["w4a16"]["ratio"]["value"] != first["w8a8"]["ratio"]["value"]
    assert capsys.readouterr().out.count("| w4a16 | ") == 1

    monkeypatch.setenv("ATOM_JAX_COMMIT", "second")
    capsys.readouterr()
    run(checkpoints, "w8a8")
    saved = json.loads(file.read_text())
    again = saved["checkpoints"]
    assert list(again) == ["w8a8", "w4a16"] and again["w4a16"] == first["w4a16"]
    commits = {name: row["environment"]["commit"] for name, row in again.items()}
    assert commits == {"w8a8": "second", "w4a16": "first"}
    assert again["w8a8"]["ratio"] == first["w8a8"]["ratio"]
    assert "| w4a16 | " in capsys.readouterr().out  # the table is that of the file

    with pytest.raises(SystemExit, match="another max_tokens: remove it"):
        run(checkpoints, "w4a16", max_tokens=100)
    assert json.loads(file.read_text()) == saved


def test_a_row_is_what_compare_and_the_card_say(checkpoints: Mapping[str, Path], file: Path) -> None:
    run(checkpoints, "w4a16")
    saved = json.loads(file.read_text())
    row, card = saved["checkpoints"]["w4a16"], read_card(checkpoints["w4a16"])
    assert saved["settings"]["source_sha256"] == card["job"]["source_sha256"]
    assert list(row["texts"]) == TEXTS
    a, b = load(checkpoints["float"]), load(checkpoints["w4a16"])
    want = compare(
        a.params,
        b.params,
        encode(checkpoints["float"] / "tokenizer", evaluation_texts()["french"]),
        config_a=a.config,
        config_b=b.config,
        seq_len=64,
        max_tokens=150,
    )
    french = row["texts"]["french"]
    assert french["ratio"]["value"] == pytest.approx(want.perplexity_b / want.perplexity_a)
    assert french["kl_divergence"] == want.kl_divergence > 0
    assert (french["tokens"], french["top1_agreement"]) == (150 - 3, want.top1_agreement)
    ratios = [text["ratio"]["value"] for text in row["texts"].values()]
    assert row["ratio"]["value"] == pytest.approx(np.exp(np.mean(np.log(ratios))))

    made = row["conversion"]
    assert made["recipe"] == card["job"]["recipe"] and made["recipe"]["scheme"] == "w4a16"
    assert made["seconds"] == card["seconds"] and made["seconds"]["total"] > 0
    assert 4 < made["bits_per_weight"] < 8
    files = [path for path in (checkpoints["w4a16"] / "params").rglob("*") if path.is_file()]
    assert made["bytes"] == sum(path.stat().st_size for path in files) > 0

    answers = [wrong["answer"] for wrong in row["questions"]["wrong"]]
    assert row["questions"]["asked"] == 2 and answers == ask(b, QUESTIONS)  # a tiny model knows nothing


def test_right_answers_are_counted(checkpoints: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "ask", lambda model, questions: ["It is an ant.", "no"])
    assert quality.asked(load(checkpoints["float"]), QUESTIONS) == {
        "asked": 2,
        "right": 1,
        "topics": {"a": 1, "b": 0},
        "wrong": [{"question": "the inn?", "answer": "no"}],
    }


def test_what_is_refused(checkpoints: Mapping[str, Path], file: Path) -> None:
    for arguments, says in (
        (["w4a16"], "'w4a16' is not NAME=CHECKPOINT"),
        (["=a"], "not NAME=CHECKPOINT"),
        (["a=b", "a=c"], "two checkpoints are called 'a'"),
    ):
        with pytest.raises(SystemExit, match=says):
            quality.named(arguments)
    assert quality.named(["w4a4 --fast=a=b"]) == {"w4a4 --fast": Path("a=b")}
    with pytest.raises(SystemExit, match=r"other and .*float were not made from the same source"):
        run(checkpoints, "w8a8", "other")
    with pytest.raises(SystemExit, match="is quantized, a bf16 conversion is expected"):
        quality.check_sources(checkpoints["w8a8"], {})
    assert not file.exists()


def test_a_card_without_a_time(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    """Checkpoints were converted before cards had one."""
    old = tmp_path / "old"
    shutil.copytree(checkpoints["w8a8"], old)
    card = read_card(old)
    del card["seconds"]
    write_card(old, card)
    assert (old / CARD_FILE).is_file() and quality.conversion(old)["seconds"] is None


ENVIRONMENT = {"gpu": None, "cpu": "a CPU", "cores": 2, "commit": "abc", "versions": {"jax": "0.10.2"}}


def row(ratio: float, *, seconds: float | None, commit: str = "abc") -> dict[str, Any]:
    """Of two texts; the second is too short for an interval."""
    ratios = ({"value": ratio, "low": ratio - 0.1, "high": ratio + 0.1}, {"value": 2.0} | NO_INTERVAL)
    texts = {
        name: {"ratio": each, "kl_divergence": 0.12345, "top1_agreement": 0.75, "tokens": 1022}
        for name, each in zip(("prose", "french"), ratios, strict=True)
    }
    return {
        "environment": ENVIRONMENT | {"commit": commit},
        "conversion": {"seconds": seconds and {"total": seconds, "stages": {}}},
        "ratio": {"value": 1.5} | NO_INTERVAL,
        "texts": texts,
        "questions": {"asked": 200, "right": 123},
    }


NO_INTERVAL = {"low": None, "high": None}
ROWS = {"slow": row(1.25, seconds=601.0), "fast": row(1.5, seconds=54.4), "older": row(1.75, seconds=None)}
MACHINE = "2,044 scored tokens; a CPU, 2 cores, jax 0.10.2, commit abc."


class TestReport:
    def test_tables(self) -> None:
        short, long = quality_report.tables(ROWS).values()
        assert short.splitlines() == [
            MACHINE,
            "",
            "|  | mean | prose | french | questions right (of 200) | converted in |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            "| slow | 1.500 | 1.250 | 2.000 | 123 | 10 min |",
            "| fast | 1.500 | 1.500 | 2.000 | 123 | 54 s |",
            "| older | 1.500 | 1.750 | 2.000 | 123 |  |",
        ]
        assert long.splitlines() == [
            MACHINE,
            "",
            "Perplexity over that of the float model, with its 95% interval:",
            "",
            "|  | geometric mean | prose | french |",
            "| --- | ---: | ---: | ---: |",
            "| slow | 1.500 | 1.250 (1.150 to 1.350) | 2.000 |",
            "| fast | 1.500 | 1.500 (1.400 to 1.600) | 2.000 |",
            "| older | 1.500 | 1.750 (1.650 to 1.850) | 2.000 |",
            "",
            "KL divergence from the float model, in nats a token:",
            "",
            "|  | prose | french |",
            "| --- | ---: | ---: |",
            *(f"| {name} | 0.123 | 0.123 |" for name in ROWS),
            "",
            "How often both models find the same token most likely:",
            "",
            "|  | prose | french |",
            "| --- | ---: | ---: |",
            *(f"| {name} | 75.0% | 75.0% |" for name in ROWS),
        ]

    def test_checkpoints_of_two_commits(self) -> None:
        head = quality_report.head(ROWS | {"new": row(1.0, seconds=1.0, commit="def")})
        where = "a CPU, 2 cores, jax 0.10.2, commit"
        assert head == f"2,044 scored tokens; slow, fast, older: {where} abc; new: {where} def."

    def test_pages_have_places(self, tmp_path: Path) -> None:
        (tmp_path / "quality.json").write_text(json.dumps({"settings": {}, "checkpoints": ROWS}))
        (tmp_path / "docs").mkdir()
        for page in quality_report.tables(ROWS):
            shutil.copy(quality_report.DOCS.parent / page, tmp_path / page)
        for _ in range(2):
            quality_report.main(results=tmp_path, root=tmp_path)
        for page, text in quality_report.tables(ROWS).items():
            assert (tmp_path / page).read_text(encoding="utf-8").count(text) == 1
