"""Answers the requests of a batch with one engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from atom_jax.batch_files import REQUEST_KINDS, BatchRequest, BatchResult
from atom_jax.engine import Engine, Output
from atom_jax.errors import AtomError
from atom_jax.openai.bodies import read_request
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.responses import ApiResponse
from atom_jax.openai.served_model import ServedModel


@dataclasses.dataclass
class _Running:
    """A request of the file that the engine is working on.

    Attributes:
      custom_id: the name of the request in both files.
      response: collects the engine's outputs for all choices of the request.
      unfinished: number of its choices that have not ended.
    """

    custom_id: str
    response: ApiResponse
    unfinished: int


def engine_answers(
    engine: Engine, model: ServedModel, requests: Iterator[BatchRequest | None], *, ahead: int
) -> Iterator[BatchResult]:
    """Yields the result of each of ``requests``, in the order in which the results are complete.

    The result of a request that cannot be answered has the status and the error that the server would send.

    Args:
      engine: an engine that has no unfinished requests.
      model: the engine's model.
      requests: what to answer. None means that no request is there now, but some may come later: the engine
        goes on with those that it has.
      ahead: the next request is given to the engine only while the engine has fewer unfinished choices
        than this, running and waiting ones together.
    """
    running: dict[str, tuple[_Running, int]] = {}
    more = True
    while more or running:
        while more and len(running) < ahead:
            try:
                request = next(requests)
            except StopIteration:
                more = False
                break
            if request is None:
                break
            try:
                running |= _add_to_engine(engine, model, request)
            except ApiError as error:
                yield BatchResult(request.custom_id, error.status, error.body)
        for output in engine.step() if running else ():
            if output.request_id not in running:
                continue  # another choice of its request has failed in this step
            try:
                ended = _take(running, output)
            except ApiError as error:
                failed, _ = running[output.request_id]
                for request_id in [each for each, (other, _) in running.items() if other is failed]:
                    engine.abort(request_id)
                    del running[request_id]
                yield BatchResult(failed.custom_id, error.status, error.body)
                continue
            if ended is not None:
                response = ended.response
                yield BatchResult(ended.custom_id, 200, response.whole(), response.completion_tokens)


def _add_to_engine(engine: Engine, model: ServedModel, line: BatchRequest) -> dict[str, tuple[_Running, int]]:
    """Gives a request to the engine, as one engine request for each choice.

    Returns:
      A dict from the id of each engine request to the request of the file and the index of the choice.

    Raises:
      ApiError: the request cannot be answered; in this case the engine has none of its choices.
    """
    try:
        request = read_request(REQUEST_KINDS[line.url], line.body)
        if request.stream:
            raise ApiError(400, "stream: a batch has no streams; leave it out", param="stream")
        engine_requests = make_engine_requests(request, model)
    except AtomError as error:
        raise ApiError(400, str(error)) from error
    response = ApiResponse(request, engine_requests, model)
    running = _Running(line.custom_id, response, len(engine_requests.choices))
    started: dict[str, tuple[_Running, int]] = {}
    for index, (prompt, params) in enumerate(engine_requests.choices):
        request_id = f"{response.id}-{index}"
        try:
            engine.add(request_id, prompt, params)
        except AtomError as error:
            for earlier in started:
                engine.abort(earlier)
            raise ApiError(400, str(error)) from error
        started[request_id] = running, index
    return started


def _take(running: dict[str, tuple[_Running, int]], output: Output) -> _Running | None:
    """Adds an output to the response of its request; returns the request if it is now complete, else None."""
    request, index = running[output.request_id]
    request.response.add(index, output)
    if output.finish_reason is None:
        return None
    del running[output.request_id]
    request.unfinished -= 1
    return None if request.unfinished else request
