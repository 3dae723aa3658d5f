"""The real SmolLM2 under the recipes of the tests, each converted and measured once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from atom_jax.errors import AtomError
from atom_jax.intervals import perplexity_ratios
from convert.calibrate.self_sampling import sample_tokens
from convert.demo.smollm2 import smollm2_gguf
from convert.demo.variants import EVAL_SEQ_LEN, EVAL_TOKENS, TextLosses, text_losses
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import Source

# Half of the default is enough for those that lose least, and saves a minute.
CALIBRATION_TOKENS = {"w8a8": 4096, "w4a16": 4096, "w3a16": 4096}

RECIPES = {
    "bf16": make_recipe("bf16"),
    "atom": make_recipe("w4a4kv4", group_size=64, num_outliers=64),
    "w4a8kv4": make_recipe("w4a8kv4", group_size=64),
    "w3a16": make_recipe("w3a16", group_size=64),
    "w4a16": make_recipe("w4a16", group_size=64),
    "w8a8": make_recipe("w8a8"),
    "per_layer": make_recipe("w4a4kv4", group_size=64, num_outliers=64, reorder="per_layer"),
    "naive": make_recipe(
        "w4a4kv4",
        group_size=None,
        num_outliers=0,
        clip_w=1.0,
        clip_a=1.0,
        gptq=False,
        migrate=False,
        center_keys=False,
        kv_bits=16,
    ),
}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other workers out while one makes ``path``."""
    with path.with_name(f"{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run, the same for all workers of xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "smollm2"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def gguf() -> Path:
    try:
        return smollm2_gguf()
    except AtomError as error:
        pytest.skip(f"the model cannot be had: {error}")


@pytest.fixture(scope="session")
def checkpoint(gguf: Path, shared: Path) -> Callable[[str], Path]:
    """Converts under one of RECIPES, once. What is sampled for the first recipe serves others, too: it
    depends on the model and the seed alone, and takes half a minute."""

    def sample_once(
        source: Source, num_tokens: int, seed: int, report: Any = None, **options: Any
    ) -> np.ndarray:
        file = shared / f"sampled-{num_tokens}-{seed}.npy"
        with locked(file):
            if not file.exists():
                np.save(file, sample_tokens(source, num_tokens, seed, report, **options))
            return np.load(file)

    def make(name: str) -> Path:
        with locked(shared / name), mock.patch("convert.calibrate.texts.sample_tokens", sample_once):
            if not (shared / name).exists():
                tokens = CALIBRATION_TOKENS.get(name, ConvertOptions.calibration_tokens)
                convert(gguf, shared / name, ConvertOptions(RECIPES[name], calibration_tokens=tokens))
        return shared / name

    return make


@pytest.fixture(scope="session")
def losses(checkpoint: Callable[[str], Path], shared: Path) -> Callable[[str], TextLosses]:
    """Of a recipe's checkpoint, on what the demo measures: the first 1,024 tokens of each reported text."""

    def measure(name: str) -> TextLosses:
        path = checkpoint(name)
        file = shared / f"{name}-losses.json"
        with locked(file):
            if not file.exists():
                file.write_text(json.dumps(text_losses(path, lambda *report: None)))
            found = TextLosses(*json.loads(file.read_text()))
        scored = EVAL_TOKENS - EVAL_TOKENS // EVAL_SEQ_LEN
        assert [sum(windows) for windows in found.scored.values()] == [scored] * 5
        return found

    return measure


@pytest.fixture(scope="session")
def perplexity_ratio(losses: Callable[[str], TextLosses]) -> Callable[[str], float]:
    """Of a recipe's checkpoint to the float model: the geometric mean over the reported texts."""

    def measure(name: str) -> float:
        # First the one that other files of tests need less: another worker may be at the float model.
        own, of_float = losses(name), losses("bf16")
        ratios = perplexity_ratios(of_float.nll, own.nll, own.scored)
        texts = ", ".join(f"{text} {ratio.value:.3f}" for text, ratio in ratios.texts.items())
        print(f"{name}: {ratios.mean.value:.3f} times the perplexity of the float model ({texts})")
        return ratios.mean.value

    return measure
