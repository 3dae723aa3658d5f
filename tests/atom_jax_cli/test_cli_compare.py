import json
import math
import shutil

import pytest

import atom_jax
from atom_jax import load
from atom_jax.text import encode
from convert.pipeline import ConvertOptions
from convert.pipeline import convert as convert_model
from convert.recipe import make_recipe
from tests.atom_jax.command import TEXT, fails, run, run_json
from tests.convert.tiny import save_tiny

KEYS = [
    "perplexity_a",
    "perplexity_b",
    "ratio",
    "kl_divergence",
    "top1_agreement",
    "layer_snr_db",
    "tokens",
    "seconds",
    "windows",
]
OPTIONS = ("--seq-len", 64, "--max-tokens", 200)


@pytest.fixture(scope="module")
def quantized(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "tiny"
    text = tmp_path_factory.mktemp("calibration") / "text.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    recipe = make_recipe("w4a4kv4", group_size=32, num_outliers=32)
    convert_model(original, out, ConvertOptions(recipe, calibration=str(text), calibration_tokens=256))
    return out


def other(tmp_path, **changes):
    """A float checkpoint of another model."""
    out = tmp_path / "converted"
    convert_model(save_tiny(tmp_path, **changes), out, ConvertOptions(make_recipe("bf16")))
    return out


@pytest.mark.slow
def test_is_the_fidelity_of_the_library(checkpoint, quantized, text):
    """The quantized checkpoint's residual stream is reordered, and still compared channel by channel."""
    a, b = load(checkpoint), load(quantized)
    want = atom_jax.compare(
        a.params,
        b.params,
        encode(checkpoint / "tokenizer", TEXT),
        config_a=a.config,
        config_b=b.config,
        seq_len=64,
        max_tokens=200,
    )
    assert want.layer_snr_db is not None
    result = run_json("compare", checkpoint, quantized, "--text", text, *OPTIONS)
    got = result["texts"][text.name]
    assert list(got) == KEYS
    assert result["ratio"] == got["ratio"]
    assert got["ratio"]["value"] == pytest.approx(want.perplexity_b / want.perplexity_a)
    assert got["ratio"]["low"] < got["ratio"]["value"] < got["ratio"]["high"]
    assert got["windows"]["tokens"] == want.scored.tolist()
    assert got["windows"]["nll_b"] == want.sums.nll_b.tolist()
    assert got["kl_divergence"] == want.kl_divergence > 0
    assert got["layer_snr_db"] == list(want.layer_snr_db)
    assert all(5 < ratio < 50 for ratio in got["layer_snr_db"])
    assert (got["tokens"], got["top1_agreement"]) == (want.tokens, want.top1_agreement)
    shown = run("compare", checkpoint, quantized, "--text", text, *OPTIONS)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.stdout.splitlines()]
    (row,) = [row for row in rows if row[:1] == [text.name]]
    assert row[1:4] == [
        f"{want.perplexity_a:.2f}",
        f"{want.perplexity_b:.2f}",
        f"{got['ratio']['value']:.3f}",
    ]
    assert row[5:] == [f"{want.kl_divergence:.4f}", f"{want.top1_agreement:.1%}"]
    assert ["geom. mean", "", "", row[3], row[4], "", ""] in rows
    assert ["1", f"{want.layer_snr_db[1]:.1f}"] in rows
    assert f"{want.tokens} tokens scored" in shown.stderr


@pytest.mark.slow
def test_with_itself(checkpoint, text):
    result = run_json("compare", checkpoint, checkpoint, "--text", text, *OPTIONS)
    assert result["ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    got = result["texts"][text.name]
    assert (got["kl_divergence"], got["top1_agreement"]) == (0.0, 1.0)
    assert got["layer_snr_db"] == [None, None]
    assert "inf" in run("compare", checkpoint, checkpoint, "--text", text, *OPTIONS).stdout


@pytest.mark.slow
def test_other_number_of_layers(checkpoint, text, tmp_path):
    deeper = other(tmp_path, num_hidden_layers=3)
    result = run("compare", checkpoint, deeper, "--text", text, *OPTIONS, "--json")
    got = json.loads(result.stdout)["texts"][text.name]
    assert got["layer_snr_db"] is None and got["kl_divergence"] > 0
    assert "no signal-to-noise ratio of the layers: the models have 2 and 3 layers" in result.stderr
    assert "signal to noise" not in run("compare", checkpoint, deeper, "--text", text, *OPTIONS).stdout


@pytest.mark.slow
def test_several_texts(checkpoint, quantized, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("the inn in the hut " * 60, encoding="utf-8")
    got = run_json("compare", checkpoint, quantized, "--text", text, "--text", other, *OPTIONS)
    assert list(got["texts"]) == [text.name, "other.txt"]
    values = [one["ratio"]["value"] for one in got["texts"].values()]
    assert got["ratio"]["value"] == pytest.approx(math.sqrt(math.prod(values)))
    shown = run("compare", checkpoint, quantized, "--text", text, "--text", other, *OPTIONS).stdout
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.slow
def test_the_reported_texts_without_a_file(checkpoint):
    got = run_json("compare", checkpoint, checkpoint, "--seq-len", 64, "--max-tokens", 70)
    assert list(got["texts"]) == ["prose", "code", "dialogue", "lists", "french"]
    assert all(one["tokens"] == 68 for one in got["texts"].values())


def test_two_texts_of_one_name(checkpoint, text):
    fails("compare", checkpoint, checkpoint, "--text", text, "--text", text, parts=[text, "rename"])


def test_other_vocabulary(checkpoint, text, tmp_path):
    larger = other(tmp_path, vocab_size=300)
    size = load(checkpoint).config.vocab_size
    fails("compare", checkpoint, larger, "--text", text, parts=["vocabularies", size, 300])


def test_other_tokenizer(checkpoint, text, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    file = copy / "tokenizer" / "tokenizer.json"
    data = json.loads(file.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    file.write_text(json.dumps(data))
    fails("compare", checkpoint, copy, "--text", text, parts=[checkpoint, copy, "different tokenizers"])


@pytest.mark.parametrize(
    ("data", "part"),
    [(None, "No such file"), (b"", "no text"), (b"i", "two tokens")],
)
def test_bad_text(checkpoint, tmp_path, data, part):
    path = tmp_path / "text.txt"
    if data is not None:
        path.write_bytes(data)
    fails("compare", checkpoint, checkpoint, "--text", path, "--seq-len", 64, parts=[part])


def test_not_a_checkpoint(checkpoint, original, text, tmp_path):
    fails("compare", checkpoint, tmp_path / "no", "--text", text, parts=[tmp_path / "no"])
    fails("compare", original, checkpoint, "--text", text, parts=[original, "atom-jax convert"])


def test_window_longer_than_the_context(checkpoint, text):
    fails("compare", checkpoint, checkpoint, "--text", text, "--seq-len", 129, parts=["128", "129"])
