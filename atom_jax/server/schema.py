"""The OpenAPI schema of the server: its requests, and the errors that it sends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_REF = "#/components/schemas/{model}"

_ERRORS = {
    400: "The request is malformed, a field is wrong or not supported, or the prompt does not fit.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    405: "The route has other methods.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    415: "The body is compressed, or it is not said to be JSON.",
    421: "The server does not answer for this host.",
    429: "As many answers run and wait as the server allows.",
    500: "A fault of the server.",
    503: "The server ends, or the engine failed.",
    504: "No whole answer in time.",
}
# Responses that are not JSON, and the one of /health that is no error of the API.
EVENTS = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}}
UNHEALTHY = {"description": "The server starts or ends, or the engine failed."}
READ_ERRORS = (401, 421, 500)
WRITE_ERRORS = tuple(_ERRORS)


class ApiErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ApiErrorBody(BaseModel):
    """The body of every response with an error."""

    error: ApiErrorDetails


def error_responses(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """The responses with errors, as FastAPI's routes take them."""
    return {status: {"model": ApiErrorBody, "description": _ERRORS[status]} for status in statuses}


def json_body(*kinds: type[BaseModel]) -> dict[str, Any]:
    """The body of a route that reads one of these requests, as FastAPI's ``openapi_extra``."""
    references = [{"$ref": _REF.format(model=kind.__name__)} for kind in kinds]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def add_schemas(app: FastAPI, *kinds: type[BaseModel]) -> None:
    """Makes ``app.openapi`` describe these requests, which FastAPI does not read itself."""

    def openapi() -> dict[str, Any]:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own error, which is never sent
        return schema

    app.openapi = openapi
