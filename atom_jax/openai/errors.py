"""Errors of a request, in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic_core import ErrorDetails

# To the location of an error pydantic adds entries that tell the types of a union apart: names of types, and
# the tags of our own unions, such as "<ids>". They name no field of the request.
_TYPE_OF_UNION = re.compile(r"(str|bool|int|float)$|.*[<\[(-]")


class ApiError(Exception):
    """An error that is the response to a request.

    Attributes:
      status: HTTP status code.
      message: one line that names what is wrong.
      param: the field of the request that is wrong, if it is one.
      code: OpenAI's name of the error, for programs.
      headers: HTTP headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON object of the response."""
        kind = {429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid_request(errors: Sequence[ErrorDetails]) -> ApiError:
    """The error to answer with when pydantic has found ``errors`` in a request.

    For a value that fits no type of a union, pydantic reports an error for each type. The error at the
    deepest location belongs to the type that fits best, and says the most.
    """
    error = max(errors, key=lambda each: len(each["loc"]))
    location = [str(entry) for entry in error["loc"]]
    location = [entry for entry in location if not _TYPE_OF_UNION.match(entry)]
    if (field := error.get("ctx", {}).get("field")) is not None:
        location.append(field)
    message = error["msg"][:1].lower() + error["msg"][1:]
    if not location:
        return ApiError(400, f"the body must be a JSON object: {message}")
    param = ".".join(location)
    return ApiError(400, f"{param}: {message}", param=param)
