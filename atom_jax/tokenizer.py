"""Loads the tokenizer of a checkpoint: exactly the pipeline in ``tokenizer.json``.

The classes of transformers that are named after a model (``LlamaTokenizer``, ...) build a pipeline of their
own around the vocabulary in ``tokenizer.json``, which can give other ids than the pipeline in the file. So
they are not used here: ``PreTrainedTokenizerFast`` wraps the pipeline of the ``tokenizers`` library, and
tokenizer_config.json only says which tokens are special and what the chat template is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from atom_jax.errors import AtomError, one_line
from atom_jax.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The pipeline in ``tokenizer.json``, with the truncation and padding that may be saved there turned off.

    Raises:
      AtomError: the file is missing, or is not a tokenizer.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise AtomError(f"{path}: no such file; the folder has no tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception
        raise AtomError(f"{path}: not readable as a tokenizer: {one_line(error)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_text(value: object) -> str | None:
    """The text of a token in a JSON file of transformers: a string, or an object with ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def wrap_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in ``folder`` as transformers' ``PreTrainedTokenizerFast``.

    Raises:
      AtomError: a file is missing or damaged.
    """
    # Imported here, because the import takes seconds and not every command needs a tokenizer.
    from transformers import PreTrainedTokenizerFast

    tokenizer = read_tokenizer(folder)
    settings = _settings(folder / SETTINGS_FILE)
    special = {name: token_text(settings.get(name)) for name in SPECIAL_TOKENS}
    options: dict[str, object] = {}
    for name in ("chat_template", "model_max_length", "padding_side"):
        if settings.get(name) is not None:
            options[name] = settings[name]
    template = folder / TEMPLATE_FILE
    try:
        if template.is_file():
            options["chat_template"] = template.read_text(encoding="utf-8")
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            model_input_names=["input_ids", "attention_mask"],
            **options,
        )
        for name, token in special.items():
            # Set afterwards, because the constructor would add the tokens to the pipeline as special ones: a
            # token that is ordinary text in the file ("!" for padding) would be cut out of every text, and
            # one that the file does not have would get a new id.
            known = token is not None and tokenizer.token_to_id(token) is not None
            setattr(wrapped, name, token if known else None)
        return wrapped
    except Exception as error:  # transformers raises many types for unusable settings
        raise AtomError(f"{folder}: not readable: {one_line(error)}") from error


def _settings(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}
