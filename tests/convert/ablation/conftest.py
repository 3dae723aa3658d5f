"""The model and the texts of the ablations."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.ablation.run import AblationOptions
from tests.convert.jobs import prose, save_text
from tests.convert.tiny import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("source"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> AblationOptions:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "other.txt").write_text(prose(9000)[5000:], encoding="utf-8")
    texts = (save_text(folder / "text.txt"), folder / "other.txt")
    return AblationOptions(
        calibration=str(texts[1]), calibration_tokens=256, texts=texts, eval_tokens=300, group_size=32
    )
