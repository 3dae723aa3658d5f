"""Answers to a file of requests in OpenAI's batch format, one line each; an interrupted run goes on.

A result is appended as one whole line when its request has ended. The file of results is therefore all the
state there is: whatever stops a run, the next one drops an unfinished last line and answers the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from atom_jax.engine import Engine, Output
from atom_jax.errors import AtomError
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError, invalid_request
from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest
from atom_jax.openai.responses import ApiResponse

_REQUESTS: dict[str, type[CompletionRequest] | type[ChatCompletionRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}


@dataclasses.dataclass(frozen=True)
class BatchProgress:
    """How far a run is.

    Attributes:
      total: lines of the file of requests.
      done: of them, those that have a result, earlier runs' included.
      failed: of those, those that this run answered with an error.
      tokens: that this run generated.
    """

    total: int
    done: int
    failed: int
    tokens: int


@dataclasses.dataclass
class _Running:
    """A line of the file of requests whose answers are being generated."""

    custom_id: str
    response: ApiResponse
    unfinished: int


def run_batch(
    engine: Engine,
    tokenizer: Any,
    requests: Path,
    results: Path,
    *,
    model_name: str,
    ahead: int,
    report: Callable[[BatchProgress], None] = lambda progress: None,
) -> BatchProgress:
    """Answers what ``results`` does not answer yet; each ``custom_id`` has one line there in the end.

    A request that cannot be answered has a line too, with the status and the error of the server.

    Args:
      requests: JSON Lines with ``custom_id``, ``method``, ``url`` and ``body``.
      results: is created, or continued.
      model_name: what the requests must call the model.
      ahead: answers that the engine has at once, running or waiting.
      report: told after every result.

    Raises:
      AtomError: a file that is not in the format, results of other requests, or a run that has them open.
    """
    ids = check_requests(requests, model_name)
    with _open_results(results) as file:
        finished = _read_results(results, file, ids)
        progress = BatchProgress(len(ids), len(finished), 0, 0)
        report(progress)
        waiting = (line for line in _read_requests(requests, model_name) if line[0] not in finished)
        for custom_id, status, body in _answers(engine, tokenizer, waiting, ahead):
            _append(file, _result(custom_id, status, body))
            progress = dataclasses.replace(
                progress,
                done=progress.done + 1,
                failed=progress.failed + (status != 200),
                tokens=progress.tokens + body.get("usage", {}).get("completion_tokens", 0),
            )
            report(progress)
    return progress


def _answers(
    engine: Engine, tokenizer: Any, lines: Iterator[tuple[str, str, Any]], ahead: int
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Custom id, status and body of each answer, in the order in which they end."""
    running: dict[str, tuple[_Running, int]] = {}
    lines = iter(lines)
    more = True
    while more or running:
        while more and len(running) < ahead:
            line = next(lines, None)
            if line is None:
                more = False
                break
            try:
                running |= _add_to_engine(engine, tokenizer, *line)
            except ApiError as error:
                yield line[0], error.status, error.body
        for output in engine.step() if running else ():
            if (ended := _take(running, output)) is not None:
                yield ended.custom_id, 200, ended.response.whole()


def _add_to_engine(
    engine: Engine, tokenizer: Any, custom_id: str, url: str, body: Any
) -> dict[str, tuple[_Running, int]]:
    """Gives a line to the engine: which answer and choice each of the engine's requests belongs to."""
    try:
        request = _REQUESTS[url].model_validate(body)
        if request.stream:
            raise ApiError(400, "stream: a batch has no streams; leave it out", param="stream")
        engine_requests = make_engine_requests(request, tokenizer, max_model_len=engine.max_model_len)
    except ValidationError as error:
        raise invalid_request(error.errors()) from error
    except AtomError as error:
        raise ApiError(400, str(error)) from error
    line = _Running(custom_id, ApiResponse(request, engine_requests, tokenizer), len(engine_requests.choices))
    started: dict[str, tuple[_Running, int]] = {}
    for index, (prompt, params) in enumerate(engine_requests.choices):
        request_id = f"{line.response.id}-{index}"
        try:
            engine.add(request_id, prompt, params)
        except AtomError as error:
            for earlier in started:
                engine.abort(earlier)
            raise ApiError(400, str(error)) from error
        started[request_id] = line, index
    return started


def _take(running: dict[str, tuple[_Running, int]], output: Output) -> _Running | None:
    """Takes in an output; the line that it completes."""
    line, index = running[output.request_id]
    line.response.add(index, output)
    if output.finish_reason is None:
        return None
    del running[output.request_id]
    line.unfinished -= 1
    return None if line.unfinished else line


def _result(custom_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


def check_requests(path: Path, model_name: str) -> set[str]:
    """The custom ids of a file of requests; AtomError naming the line if it is none, or for another model."""
    return {custom_id for custom_id, _, _ in _read_requests(path, model_name)}


def _read_requests(path: Path, model_name: str) -> Iterator[tuple[str, str, Any]]:
    """Custom id, route and body of each line; AtomError naming the line otherwise."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in _lines(file):
            where = f"{path}: line {number}"
            record = _json_object(line, where)
            custom_id, url, body = (record.get(key) for key in ("custom_id", "url", "body"))
            if not isinstance(custom_id, str) or not custom_id:
                raise AtomError(f'{where} has no "custom_id" string')
            if not _is_unicode(custom_id):  # half of a pair, which JSON can write and no file contains
                raise AtomError(f"{where}: custom_id {custom_id!r} is not valid Unicode")
            if custom_id in seen:
                raise AtomError(f"{where}: custom_id {custom_id!r} is there twice")
            if record.get("method") != "POST" or url not in _REQUESTS:
                raise AtomError(f"{where}: POST to one of {', '.join(_REQUESTS)} expected")
            if not isinstance(body, dict):
                raise AtomError(f'{where} has no "body" object')
            model = body.get("model")
            if isinstance(model, str) and model != model_name:
                raise AtomError(f"{where} is for model {model!r}; give --model-name to call this model so")
            seen.add(custom_id)
            yield custom_id, url, body


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, and their numbers."""
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, an endless integer or nesting
        raise AtomError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise AtomError(f"{where}: a JSON object expected, found {type(record).__name__}")
    return record


@contextlib.contextmanager
def _open_results(path: Path) -> Iterator[int]:
    """The file of results to read and append, for one process at a time."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AtomError(f"{path}: another run writes it") from None
        yield file
    finally:
        os.close(file)


def _read_results(path: Path, file: int, ids: Collection[str]) -> set[str]:
    """The custom ids that have a result; an unfinished last line is cut off."""
    finished: set[str] = set()
    complete = 0
    with path.open("rb") as reader:
        for number, line in _lines(reader):
            if not line.endswith(b"\n"):
                break
            where = f"{path}: line {number}"
            custom_id = _json_object(line, where).get("custom_id")
            if not isinstance(custom_id, str) or custom_id not in ids:
                raise AtomError(f"{where} is a result of {custom_id!r}, which is not among the requests")
            if custom_id in finished:
                raise AtomError(f"{where}: custom_id {custom_id!r} is there twice")
            finished.add(custom_id)
            complete = reader.tell()
    os.ftruncate(file, complete)
    return finished


def _append(file: int, result: dict[str, Any]) -> None:
    """Adds a line; it is on the disk afterwards."""
    line = json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]
    os.fsync(file)
