import dataclasses
import json

import pytest
from typer.testing import CliRunner

import atom_jax
from atom_jax_cli import app
from convert.card import read_card
from convert.demo import variants as demo
from convert.recipe import make_recipe
from tests.convert.tiny import fails, save_tiny


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """The demo on a tiny model with one variant; collects the conversions it does."""
    source = save_tiny(tmp_path / "source")
    done = []

    def convert(src, out, options, progress):
        done.append(out)
        return real(src, out, options, progress)

    real = demo.convert
    monkeypatch.setattr(demo, "convert", convert)
    monkeypatch.setattr(demo, "smollm2_gguf", lambda: source)
    monkeypatch.setattr(demo, "VARIANTS", (demo.Variant(demo.ATOM, "tiny", make_recipe("bf16")),))
    monkeypatch.setattr(demo, "EVAL_TOKENS", 128)
    monkeypatch.setattr(demo, "EVAL_SEQ_LEN", 64)
    return done


def prepare(folder):
    return demo.prepare(folder, lambda stage, done, total: None)


def test_second_run_does_nothing_and_another_recipe_starts_again(conversions, monkeypatch, tmp_path):
    folder = tmp_path / "demo"
    (first,) = prepare(folder)
    assert (first.label, first.tokens) == ("tiny", 5 * 126)
    assert list(first.perplexity) == ["prose", "code", "dialogue", "lists", "french"]
    assert first.ratio.texts.keys() == first.perplexity.keys()
    assert all(perplexity > 1 for perplexity in first.perplexity.values())
    assert first.ratio.mean.value == 1.0
    assert first.seconds is not None
    assert first.size == sum(
        file.stat().st_size for file in (folder / demo.ATOM).rglob("*") if file.is_file()
    )
    assert prepare(folder) == [first]
    assert conversions == [folder / demo.ATOM]

    other = dataclasses.replace(demo.VARIANTS[0], recipe=make_recipe("bf16", kv_rope="pre"))
    monkeypatch.setattr(demo, "VARIANTS", (other,))
    prepare(folder)
    assert atom_jax.load(folder / demo.ATOM).config.format.kv_rope == "pre"


def test_ratios_are_to_the_first_variant(conversions, monkeypatch, tmp_path):
    recipe = make_recipe("w4a4kv4", group_size=32, num_outliers=32)
    monkeypatch.setattr(demo, "VARIANTS", (*demo.VARIANTS, demo.Variant("small", "4 bits", recipe)))
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 256)
    first, second = prepare(tmp_path / "demo")
    for text, ratio in second.ratio.texts.items():
        assert ratio.value == pytest.approx(second.perplexity[text] / first.perplexity[text])
    mean = second.ratio.mean
    assert mean.low is not None and mean.high is not None
    assert mean.low < mean.value < mean.high


def test_damaged_results_are_measured_again_and_the_time_is_that_of_the_card(conversions, tmp_path):
    (first,) = prepare(tmp_path / "demo")
    (tmp_path / "demo" / "results.json").write_text("{")
    assert prepare(tmp_path / "demo") == [first]
    assert first.seconds == read_card(tmp_path / "demo" / demo.ATOM)["seconds"]["total"]


def test_foreign_folder_stays(conversions, tmp_path):
    precious = tmp_path / demo.ATOM / "precious"
    precious.parent.mkdir()
    precious.write_text("")
    with fails(tmp_path / demo.ATOM, "exists"):
        prepare(tmp_path)
    assert precious.exists()


def test_command(conversions, tmp_path):
    args = ["demo", "--dir", str(tmp_path / "demo"), "--prompt", "the"]
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got["variants"][0]["label"] == "tiny"
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert "> the\n" + got["answer"]["text"] in shown.stdout
    assert got["variants"][0]["ratio"]["mean"]["value"] == 1.0
    assert "x float" in shown.stdout and "french" in shown.stdout
    assert len(conversions) == 1
