"""The files of a batch in OpenAI's format: requests are read and checked, results are appended.

No other state is kept: after any interruption, the next run removes an incomplete last line and answers the
requests that have no result yet.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from atom_jax.errors import AtomError
from atom_jax.openai.requests import ChatCompletionRequest, CompletionRequest

REQUEST_KINDS: dict[str, type[CompletionRequest] | type[ChatCompletionRequest]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
}


@dataclasses.dataclass(frozen=True)
class BatchProgress:
    """How many requests of a run are done.

    Attributes:
      total: number of requests in the file.
      done: number of requests that have a result, from this run or an earlier one.
      failed: number of requests that this run answered with an error.
      tokens: number of tokens that this run generated.
    """

    total: int
    done: int
    failed: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """One line of the file of requests.

    Attributes:
      custom_id: the name of the request, unique in the file.
      url: the endpoint, one of ``REQUEST_KINDS``.
      body: the request as the server would receive it, a JSON object.
    """

    custom_id: str
    url: str
    body: dict[str, object]


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """The answer to one request.

    Attributes:
      custom_id: the name of the request in both files.
      status: HTTP status code that the server would send.
      body: the response or the error, a JSON object.
      tokens: number of generated tokens.
    """

    custom_id: str
    status: int
    body: Mapping[str, object]
    tokens: int = 0


def run_batch(
    answer: Callable[[Iterator[BatchRequest]], Iterable[BatchResult]],
    requests: Path,
    results: Path,
    *,
    model_name: str,
    on_result: Callable[[BatchProgress], None] = lambda progress: None,
) -> BatchProgress:
    """Answers all requests that have no result yet; at the end ``results`` has one line for each request.

    Args:
      answer: gives the results of these requests, in any order: ``atom_jax.batch.engine_answers`` or
        ``atom_jax.ray_batch.ray_answers`` with its other arguments.
      requests: file of JSON Lines with ``custom_id``, ``method``, ``url`` and ``body``.
      results: file for the results; created, or continued if it exists.
      model_name: the name that the requests must have in ``model``.
      on_result: called once at the beginning, and after every result.

    Returns:
      The progress at the end of the run.

    Raises:
      AtomError: a file is not in the batch format, ``results`` has results of other requests, another run
        is writing ``results``, or ``answer`` has left requests out.
    """
    ids = check_requests(requests, model_name)
    with _open_results(results) as file:
        finished = _read_results(results, file, ids)
        progress = BatchProgress(len(ids), len(finished), 0, 0)
        on_result(progress)
        waiting = (each for each in _read_requests(requests, model_name) if each.custom_id not in finished)
        for result in answer(waiting) if len(finished) < len(ids) else ():
            if result.custom_id in finished:
                continue  # whoever repeats work after a failure may give a result twice; the first is kept
            finished.add(result.custom_id)
            _append(file, result)
            progress = dataclasses.replace(
                progress,
                done=progress.done + 1,
                failed=progress.failed + (result.status != 200),
                tokens=progress.tokens + result.tokens,
            )
            on_result(progress)
    if progress.done < progress.total:
        missing = progress.total - progress.done
        raise AtomError(f"{results}: {missing} requests got no result; the same command answers them")
    return progress


def check_requests(path: Path, model_name: str) -> set[str]:
    """The custom ids in a file of requests.

    Raises:
      AtomError: a line is not in the batch format, or is for another model; the message names the line.
    """
    return {request.custom_id for request in _read_requests(path, model_name)}


def _read_requests(path: Path, model_name: str) -> Iterator[BatchRequest]:
    """Yields the requests of a file. Errors are those of ``check_requests``."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in _lines(file):
            where = f"{path}: line {number}"
            record = _json_object(line, where)
            custom_id, url, body = (record.get(key) for key in ("custom_id", "url", "body"))
            if not isinstance(custom_id, str) or not custom_id:
                raise AtomError(f'{where} has no "custom_id" string')
            if not _is_unicode(custom_id):  # half of a surrogate pair: JSON can express it, a file cannot
                raise AtomError(f"{where}: custom_id {custom_id!r} is not valid Unicode")
            if custom_id in seen:
                raise AtomError(f"{where}: custom_id {custom_id!r} is there twice")
            if record.get("method") != "POST" or not isinstance(url, str) or url not in REQUEST_KINDS:
                raise AtomError(f"{where}: POST to one of {', '.join(REQUEST_KINDS)} expected")
            if not isinstance(body, dict):
                raise AtomError(f'{where} has no "body" object')
            model = body.get("model")
            if isinstance(model, str) and model != model_name:
                raise AtomError(f"{where} is for model {model!r}; give --model-name to call this model so")
            seen.add(custom_id)
            yield BatchRequest(custom_id, url, body)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, each with its line number (the first is 1)."""
    return ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _json_object(line: bytes, where: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad UTF-8 or JSON, too many digits, too deep nesting
        raise AtomError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise AtomError(f"{where}: a JSON object expected, found {type(record).__name__}")
    return record


@contextlib.contextmanager
def _open_results(path: Path) -> Iterator[int]:
    """Opens the file of results for reading and appending, and locks it against other processes.

    Yields:
      The file descriptor.

    Raises:
      AtomError: another process holds the lock.
    """
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
    """The custom ids that have a result. An incomplete last line is removed from the file.

    Args:
      path: path of the file of results, for reading and for error messages.
      file: descriptor of the same file.
      ids: custom ids of all requests.

    Raises:
      AtomError: a line is not a result of one of the requests, or a request has two results.
    """
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


def _append(file: int, result: BatchResult) -> None:
    """Appends a line to the file of results and waits until it is on the disk."""
    record = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": result.custom_id,
        "response": {
            "status_code": result.status,
            "request_id": uuid.uuid4().hex,
            "body": result.body,
        },
        "error": None,
    }
    line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    while line:
        line = line[os.write(file, line) :]
    os.fsync(file)
