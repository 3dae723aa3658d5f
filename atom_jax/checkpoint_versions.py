"""How config.json of earlier versions is read. All versions have the same other files."""

from __future__ import annotations

from typing import Any, Literal

from atom_jax.config import check_choice
from atom_jax.errors import AtomError

FORMAT_VERSION = 5

# Settings of the converter, which version 1 of config.json contained too.
_RECIPE_OF_VERSION_1 = frozenset(("clip_w", "gptq", "rotate", "migrate", "smooth_keys"))
_REORDER_OF_VERSION_1 = Literal["folded", "per_layer", "none"]


def upgraded(data: dict[str, Any], version: int) -> dict[str, Any]:
    """The content of config.json, written as version ``version``, as ``FORMAT_VERSION`` has it.

    Raises:
      AtomError: the content is not one of that version.
    """
    if version < 2:
        data = _from_version_1(data)
    if version < 3:
        data = _with_setting(data, "head_bits", 16)  # the embedding and the head were always bfloat16
    if version < 4:
        data = _with_setting(data, "rotate_inner", False)
    return _with_setting(data, "shards", 1) if version < 5 else data


def _from_version_1(data: dict[str, Any]) -> dict[str, Any]:
    """Version 1 has the format and the converter's recipe in one object."""
    data = {"windows": (), **data}
    settings = data.pop("quantization", None)
    if not isinstance(settings, dict):
        raise AtomError("model configuration is not readable: no settings under 'quantization'")
    settings = {"center_keys": False, "reorder": "folded", **settings}
    reorder = settings.pop("reorder")
    check_choice("reorder", reorder, _REORDER_OF_VERSION_1)
    settings["gather_inputs"] = reorder == "per_layer"
    kept = {name: value for name, value in settings.items() if name not in _RECIPE_OF_VERSION_1}
    return {**data, "format": kept}


def _with_setting(data: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The content with a setting of the format that a later version added."""
    settings = data.get("format")
    if not isinstance(settings, dict):
        raise AtomError("model configuration is not readable: no settings under 'format'")
    return {**data, "format": {**settings, name: value}}
