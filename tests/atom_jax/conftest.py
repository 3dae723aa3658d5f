"""A tiny checkpoint for the tests of the command line, and a tokenizer for those of the API."""

import pytest

from atom_jax.checkpoint import TOKENIZER_FOLDER, load_tokenizer
from convert.pipeline import ConvertOptions
from convert.pipeline import convert as convert_model
from convert.recipe import make_recipe
from tests.atom_jax.command import TEXT
from tests.convert.tiny import save_tiny, save_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def checkpoint(original, tmp_path_factory):
    """A float checkpoint: what it computes compiles fastest."""
    out = tmp_path_factory.mktemp("converted") / "tiny"
    convert_model(original, out, ConvertOptions(make_recipe("bf16")))
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / TOKENIZER_FOLDER).mkdir()
    save_tokenizer(folder / TOKENIZER_FOLDER)
    return load_tokenizer(folder)
