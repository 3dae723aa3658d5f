"""Writes the tokenizer of a checkpoint, and checks that it works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from atom_jax.errors import AtomError, one_line
from atom_jax.tokenizer import SETTINGS_FILE, TOKENIZER_FILE, wrap_tokenizer

_PROBE = "It's 12 words:\n  [INST] naïve 漢字 🎉 [/INST]\t"


def write_tokenizer_files(tokenizer: Tokenizer, settings: dict[str, Any], out: Path, *, where: str) -> None:
    """Writes tokenizer.json and tokenizer_config.json into the folder ``out`` and reads them back.

    Args:
      tokenizer: the pipeline, including special tokens.
      settings: special tokens by name, the chat template and other settings; those with None are left out.
      out: folder to write to; created if it does not exist.
      where: the file that the tokenizer comes from, for error messages.

    Raises:
      AtomError: the written tokenizer cannot be loaded, or does not encode and decode; its files are removed.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    data = {
        # The class of transformers that uses the pipeline in tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **{key: value for key, value in settings.items() if value is not None},
    }
    out.mkdir(parents=True, exist_ok=True)
    files = (out / TOKENIZER_FILE, out / SETTINGS_FILE)
    try:
        tokenizer.save(str(files[0]))
        files[1].write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _check(tokenizer, out)
    except Exception as error:  # tokenizers raises a bare Exception
        for file in files:
            file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise
        raise AtomError(f"{where}: its tokenizer cannot be used: {one_line(error)}") from error


def _check(tokenizer: Tokenizer, out: Path) -> None:
    written = wrap_tokenizer(out)
    ids = written(_PROBE, verbose=False).input_ids
    if ids != tokenizer.encode(_PROBE).ids:
        raise AtomError("read back, it gives other ids")
    if not written(_PROBE, add_special_tokens=False, verbose=False).input_ids:
        raise AtomError(f"it gives no ids for {_PROBE!r}")
    written.decode(ids, skip_special_tokens=True)
