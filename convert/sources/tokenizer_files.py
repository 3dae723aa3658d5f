"""Reads the tokenizer of a folder in the Hugging Face layout.

If there is a ``tokenizer.json``, its pipeline is used. Otherwise the pipeline is built from
``tokenizer.model`` (SentencePiece) or from ``vocab.json`` and ``merges.txt`` (byte-level BPE). No code of a
checkpoint is run. The tokenizer classes of transformers are not used, because those named after a model build
pipelines of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError, one_line
from atom_jax.tokenizer import (
    SETTINGS_FILE,
    SPECIAL_TOKENS,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    read_tokenizer,
    token_text,
)
from convert.sources.base import read_settings, refuse_pointer
from convert.sources.gguf_pretokenizers import PRE_TOKENIZERS
from convert.sources.gguf_tokenizer import byte_level_tokenizer
from convert.sources.sentencepiece_bpe import template
from convert.sources.sentencepiece_model import read_sentencepiece

MODEL_FILE = "tokenizer.model"
VOCAB_FILE, MERGES_FILE = "vocab.json", "merges.txt"
ADDED_FILE = "added_tokens.json"
MAP_FILE = "special_tokens_map.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    SETTINGS_FILE,
    MAP_FILE,
    ADDED_FILE,
    TEMPLATE_FILE,
    VOCAB_FILE,
    MERGES_FILE,
    MODEL_FILE,
)
# Classes of transformers, without "Fast", that tokenize by the rules in the vocabulary file alone; and the
# byte-level ones, with the name of their pre-tokenizer.
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
_BYTE_LEVEL_CLASSES = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_ARCHITECTURE_CLASSES = {"Qwen2ForCausalLM": "Qwen2Tokenizer", "Qwen3ForCausalLM": "Qwen2Tokenizer"}


def tokenizer_file(folder: Path) -> Path | None:
    """The file from which the tokenizer in ``folder`` is read; None if the folder has no tokenizer."""
    paths = (folder / name for name in (TOKENIZER_FILE, MODEL_FILE, VOCAB_FILE))
    return next((path for path in paths if path.is_file()), None)


def folder_tokenizer(folder: Path, config: ModelConfig) -> tuple[Tokenizer, dict[str, Any]]:
    """The pipeline of the tokenizer in ``folder``, and the settings for ``write_tokenizer_files``.

    Args:
      folder: folder of the checkpoint.
      config: configuration of the model.

    Raises:
      AtomError: there is no tokenizer, one of its files is damaged, or it is of a kind that is not supported.
    """
    path = tokenizer_file(folder)
    if path is None:
        raise AtomError(
            f"{folder}: has no tokenizer; looked for {TOKENIZER_FILE}, {MODEL_FILE} and {VOCAB_FILE}"
        )
    settings, named = _settings(folder), {}
    if path.name == TOKENIZER_FILE:
        refuse_pointer(path)
        tokenizer = read_tokenizer(folder)
        # tokenizer.json may be older than the settings: tokens of the settings that it lacks are added if
        # the model has their ids.
        declared_in, tokens = _declared_tokens(folder, settings)
        missing = {
            index: token
            for index, token in tokens.items()
            if index < config.vocab_size and tokenizer.token_to_id(token.content) is None
        }
        _add_tokens(tokenizer, declared_in, missing)
    elif path.name == MODEL_FILE:
        tokenizer, named = _from_sentencepiece(folder, settings)
    else:
        tokenizer = _from_byte_level(folder, settings, config)
    # Special tokens that no file names come from the model's configuration.
    ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None)}
    named = {name: tokenizer.id_to_token(index) for name, index in ids.items() if index is not None} | named
    special = {name: token_text(settings.get(name, named.get(name))) for name in SPECIAL_TOKENS}
    return tokenizer, {
        **special,
        "chat_template": _chat_template(folder, settings),
        "model_max_length": config.max_position_embeddings,
        "padding_side": settings.get("padding_side"),
    }


def stop_token_id(folder: Path, config: ModelConfig) -> int | None:
    """The id of the tokenizer's end-of-sequence token; None if there is none or the model lacks its id."""
    tokenizer, settings = folder_tokenizer(folder, config)
    token = settings["eos_token"]
    index = None if token is None else tokenizer.token_to_id(token)
    return index if index is not None and index < config.vocab_size else None


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json if transformers reads that, too."""
    settings = read_settings(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    if "added_tokens_decoder" not in settings and (folder / MAP_FILE).is_file():
        settings |= read_settings(folder / MAP_FILE)
    return settings


def _chat_template(folder: Path, settings: dict[str, Any]) -> Any:
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        return settings.get("chat_template")
    refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AtomError(f"{path}: cannot be read: {one_line(error)}") from error


def _class_name(folder: Path, settings: dict[str, Any], file: str) -> str | None:
    """The tokenizer class in the settings, without "Fast"; AtomError if it is code of the checkpoint."""
    auto = settings.get("auto_map")
    name = settings.get("tokenizer_class")
    if auto:
        raise AtomError(
            f"{folder / SETTINGS_FILE}: the tokenizer {name or auto!s:.60} is code of the checkpoint "
            f"(auto_map), which is not run, and {file} alone may not be all of it; add a {TOKENIZER_FILE}"
        )
    return name.removesuffix("Fast") if isinstance(name, str) else None


def _from_sentencepiece(folder: Path, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer in tokenizer.model, and its special tokens by name.

    BOS is added to a text and EOS is not, unless tokenizer_config.json says otherwise.
    """
    name = _class_name(folder, settings, MODEL_FILE)
    if name is not None and name not in _SENTENCEPIECE_CLASSES:
        raise AtomError(
            f"{folder / SETTINGS_FILE}: a {name} cannot be made from {MODEL_FILE}; "
            f"supported: {', '.join(_SENTENCEPIECE_CLASSES)}; or add a {TOKENIZER_FILE}"
        )
    path = folder / MODEL_FILE
    model = read_sentencepiece(path)
    tokenizer = model.tokenizer
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in model.control.values()]
    )
    _add_tokens(tokenizer, *_declared_tokens(folder, settings))
    _add_special(tokenizer, settings)
    _add_around(tokenizer, model.named | _named(settings), settings, add_bos=True)
    return tokenizer, model.named


def _from_byte_level(folder: Path, settings: dict[str, Any], config: ModelConfig) -> Tokenizer:
    """The tokenizer in vocab.json and merges.txt; its class or the architecture says how text is split."""
    name = _class_name(folder, settings, VOCAB_FILE) or _ARCHITECTURE_CLASSES.get(config.architecture)
    if name not in _BYTE_LEVEL_CLASSES:
        raise AtomError(
            f"{folder}: a tokenizer of class {name} cannot be made from {VOCAB_FILE}; "
            f"supported: {', '.join(_BYTE_LEVEL_CLASSES)}; or add a {TOKENIZER_FILE}"
        )
    if settings.get("add_prefix_space"):
        raise AtomError(f"{folder / SETTINGS_FILE}: add_prefix_space true is not supported")
    path, ids = folder / MERGES_FILE, read_settings(folder / VOCAB_FILE)
    refuse_pointer(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        merges: list[Any] = [
            tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
        ]
        tokenizer = byte_level_tokenizer(ids, merges, PRE_TOKENIZERS[_BYTE_LEVEL_CLASSES[name]], None)
    except Exception as error:  # tokenizers raises a bare Exception
        raise AtomError(f"{path}: no tokenizer can be made of it: {one_line(error)}") from error
    _add_tokens(tokenizer, *_declared_tokens(folder, settings))
    _add_special(tokenizer, settings)
    _add_around(tokenizer, _named(settings), settings, add_bos=False)
    return tokenizer


def _named(settings: dict[str, Any]) -> dict[str, str]:
    tokens = {name: token_text(settings.get(name)) for name in SPECIAL_TOKENS}
    return {name: token for name, token in tokens.items() if token is not None}


def _declared_tokens(folder: Path, settings: dict[str, Any]) -> tuple[Path, dict[int, AddedToken]]:
    """The tokens that the settings, or else added_tokens.json, add to the vocabulary.

    Returns:
      The file that names them, and the tokens by id.

    Raises:
      AtomError: they are malformed.
    """
    path, declared = folder / SETTINGS_FILE, settings.get("added_tokens_decoder")
    if declared is None and (folder / ADDED_FILE).is_file():
        path = folder / ADDED_FILE
        declared = {index: {"content": token} for token, index in read_settings(path).items()}
    named = _special_names(settings)
    try:
        tokens = {
            int(index): AddedToken(
                token["content"],
                special=bool(token.get("special", token["content"] in named)),
                lstrip=bool(token.get("lstrip", False)),
                rstrip=bool(token.get("rstrip", False)),
                single_word=bool(token.get("single_word", False)),
                normalized=False,  # matched as it is written, before normalization
            )
            for index, token in (declared or {}).items()
        }
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise AtomError(f"{path}: its added tokens cannot be read: {one_line(error)}") from error
    return path, dict(sorted(tokens.items()))


def _special_names(settings: dict[str, Any]) -> set[str]:
    """All tokens that the settings name as special."""
    named = set(_named(settings).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = settings.get(key) or []
        values = values.values() if isinstance(values, dict) else values
        named |= {token for token in map(token_text, values) if token is not None}
    return named


def _add_tokens(tokenizer: Tokenizer, path: Path, tokens: dict[int, AddedToken]) -> None:
    """Adds ``tokens``; AtomError, which names ``path``, if a token does not get its id."""
    for index, token in tokens.items():
        add = tokenizer.add_special_tokens if token.special else tokenizer.add_tokens
        add([token])
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise AtomError(
                f"{path}: added token {token.content!r:.60} has id {index}, but {found} in the vocabulary"
            )


def _add_special(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    """Makes those tokens of the vocabulary special that the settings name as special but do not add."""
    # Tokens that were added are left out, because adding them again would reset their flags.
    named = _special_names(settings) - {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    known = [token for token in sorted(named) if tokenizer.token_to_id(token) is not None]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])


def _add_around(
    tokenizer: Tokenizer, named: dict[str, str], settings: dict[str, Any], *, add_bos: bool
) -> None:
    """Sets the post-processor that adds BOS and EOS around a text.

    Args:
      tokenizer: the tokenizer to change.
      named: special tokens by name ("bos_token", "eos_token").
      settings: the settings, which say whether BOS and EOS are added.
      add_bos: whether BOS is added if the settings do not say.
    """

    def special(name: str, default: bool) -> tuple[str, int] | None:
        wanted = settings.get(f"add_{name}_token")
        token = named.get(f"{name}_token")
        index = None if token is None else tokenizer.token_to_id(token)
        if not (default if wanted is None else wanted) or token is None or index is None:
            return None
        return token, index

    around = template(special("bos", add_bos), special("eos", False))
    if around:
        tokenizer.post_processor = around
