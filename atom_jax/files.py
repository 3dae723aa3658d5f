"""Reads JSON files that other programs or users wrote, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from atom_jax.errors import AtomError, one_line


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
      AtomError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AtomError(f"{path}: no such file") from None
    except OSError as error:
        raise AtomError(f"{path}: cannot be read: {one_line(error)}") from error
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 or JSON, too many digits
        raise AtomError(f"{path}: not readable as JSON: {one_line(error)}") from error
    if not isinstance(data, dict):
        raise AtomError(f"{path}: a JSON object expected, found {type(data).__name__}")
    return data
