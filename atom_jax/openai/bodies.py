"""Bodies of requests, from bytes to a request with checked fields."""

from __future__ import annotations

import re
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from atom_jax.openai.errors import ApiError, invalid_request
from atom_jax.openai.fields import Fields

# The most lists and objects in a body. Two million of them take seconds to become Python objects, and as long
# no other thread can run. Messages and prompts are hundreds at most.
MAX_CONTAINERS = 20_000

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')

_Request = TypeVar("_Request", bound=Fields)


def parse_json(body: bytes) -> object:
    """The JSON value of a body.

    Raises:
      ApiError: the body is not JSON in UTF-8, or is nested too deeply or has too many parts.
    """
    if not body.strip():
        raise ApiError(400, "the body is empty; a JSON object is expected")
    _check_utf8(body)
    if _containers(body) > MAX_CONTAINERS and _containers(_STRING.sub(b"", body)) > MAX_CONTAINERS:
        raise ApiError(400, f"the body has more than {MAX_CONTAINERS} lists and objects")
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        if "recursion limit" in str(error):
            raise ApiError(400, "the body is nested too deeply") from error
        raise ApiError(400, f"the body is not JSON: {error}") from error


def read_request(kind: type[_Request], value: object) -> _Request:
    """A JSON value as a request of this kind.

    Raises:
      ApiError: a field is wrong, unknown or not supported.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False, include_input=False)) from error


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _check_utf8(body: bytes) -> None:
    if body.startswith(b"\x1f\x8b"):
        raise ApiError(400, "the body is compressed (gzip); send it as plain JSON")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{body[error.start]:02x} at position {error.start}"
        raise ApiError(400, f"the body is not UTF-8: {wrong}; JSON must be sent as UTF-8") from error
