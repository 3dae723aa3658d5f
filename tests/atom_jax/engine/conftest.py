"""A tiny float model with a tokenizer; engines of one size, so that all tests share its compiled programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from atom_jax.checkpoint import TOKENIZER_FOLDER, Model
from atom_jax.config import preset
from tests.atom_jax.models import TINY_GROUPS, tiny_config, tiny_params
from tests.convert.tiny import save_tokenizer, tiny_vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of which only the tokenizer is there."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / TOKENIZER_FOLDER).mkdir()
    save_tokenizer(folder / TOKENIZER_FOLDER)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    config = tiny_config(vocab_size=len(tiny_vocabulary()), num_layers=1)
    return Model(folder, config, tiny_params(config))


@pytest.fixture(scope="module")
def quantized(folder: Path) -> Model:
    config = tiny_config(preset("w4a4kv4", **TINY_GROUPS), vocab_size=len(tiny_vocabulary()))
    return Model(folder, config, tiny_params(config))
