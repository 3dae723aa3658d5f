"""What went wrong with a request, in the form of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# What pydantic adds to the place of an error to tell the types of a union apart.
_TYPE_OF_UNION = re.compile(r"(str|bool|int|float)$|.*[\[(-]")


class ApiError(Exception):
    """An answer other than 2xx.

    Attributes:
      status: of HTTP.
      message: one line that names the culprit.
      param: the field of the request, if it is one.
      code: for programs, as OpenAI names it.
      headers: of the answer.
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
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        kind = {429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error that says most of those that pydantic found: the one deepest in the request."""
    error = max(errors, key=lambda each: len(each["loc"]))
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']}")
    places = [str(place) for place in error["loc"] if place != "body"]
    places = [place for place in places if not _TYPE_OF_UNION.match(place)]
    param = error.get("ctx", {}).get("field") or ".".join(places) or None
    message = error["msg"][:1].lower() + error["msg"][1:]
    if param is None:
        return ApiError(400, f"the body must be a JSON object (application/json): {message}")
    return ApiError(400, f"{param}: {message}", param=param)
