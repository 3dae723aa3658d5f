"""What a model's authors say about sampling: from the original into the checkpoint, and from there used."""

import json
import types
from typing import Any

import pytest

from atom_jax.checkpoint import TOKENIZER_FOLDER
from atom_jax.generation_defaults import GENERATION_FILE, default_sampling
from atom_jax.openai.served_model import served_model
from atom_jax.sampling import SamplingParams
from convert.sources import open_source
from tests.convert.tiny import fails, save_tiny, write_json


@pytest.fixture
def written(tmp_path):
    """``written(settings)``: the file in a checkpoint of an original that has these settings."""

    def write(settings):
        folder, out = save_tiny(tmp_path / "original"), tmp_path / "out" / TOKENIZER_FOLDER
        out.mkdir(parents=True)
        if settings is not None:
            write_json(folder / "generation_config.json", settings)
        open_source(folder).write_tokenizer(out)
        return tmp_path / "out"

    return write


def test_the_converter_keeps_what_is_about_sampling(written):
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": None,
        "eos_token_id": 2,
    }
    checkpoint = written({**settings, "repetition_penalty": 1.05, "transformers_version": "4.40.0"})
    kept = json.loads((checkpoint / TOKENIZER_FOLDER / GENERATION_FILE).read_text())
    assert kept == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    sampling = default_sampling(checkpoint)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)


@pytest.mark.parametrize("settings", [None, {}, {"eos_token_id": 2, "temperature": None}])
def test_else_the_temperature_is_one(written, settings):
    checkpoint = written(settings)
    assert not (checkpoint / TOKENIZER_FOLDER / GENERATION_FILE).exists()
    assert default_sampling(checkpoint) == SamplingParams(temperature=1.0)


def test_all_tokens_have_two_names(written):
    assert default_sampling(written({"top_k": -1})) == SamplingParams(temperature=1.0, top_k=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.6"),
        ("temperature", -1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_k", 1.5),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.5),
        ("min_p", [0.1]),
        ("repetition_penalty", 0),
    ],
)
def test_wrong_settings_are_refused(written, name, value, tmp_path):
    with fails("generation_config.json", name):
        written({name: value})
    folder = tmp_path / "damaged" / TOKENIZER_FOLDER
    folder.mkdir(parents=True)
    write_json(folder / GENERATION_FILE, {name: value})
    with fails(GENERATION_FILE, name):
        default_sampling(tmp_path / "damaged")


def test_they_can_be_turned_off(written, tokenizer):
    config = types.SimpleNamespace(vocab_size=300, eos_token_ids=(0,))
    model: Any = types.SimpleNamespace(path=written({"temperature": 0.5}), tokenizer=tokenizer, config=config)
    engine: Any = types.SimpleNamespace(max_model_len=64)
    assert served_model(model, engine).sampling.temperature == 0.5
    assert served_model(model, engine, generation_config=False).sampling.temperature == 1.0
