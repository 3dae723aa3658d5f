"""Answers the requests of a batch with several replicas of the model, by Ray Data.

``BatchAnswerer`` is the class for ``ray.data.Dataset.map_batches``, in any pipeline; ``ray_answers`` is the
pipeline of ``atom-jax batch --ray``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import queue
import re
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from atom_jax.batch import engine_answers
from atom_jax.batch_files import REQUEST_KINDS, BatchRequest, BatchResult
from atom_jax.checkpoint import load
from atom_jax.compilation_cache import enable_compilation_cache
from atom_jax.engine import Engine, EngineConfig
from atom_jax.engine.sizes import within_memory
from atom_jax.errors import AtomError, one_line
from atom_jax.openai.errors import ApiError
from atom_jax.openai.served_model import ServedModel, served_model
from atom_jax.sharded import first_devices

# How many blocks of requests a replica works on at a time: its engine has enough to do while one block ends.
BLOCKS_AT_ONCE = 8
_CONNECT_SECONDS = 10


class BatchAnswerer:
    """A replica of a model that answers requests, for ``ray.data.Dataset.map_batches``.

    Each actor loads the checkpoint and compiles the engine's programs once. Calls may overlap
    (``ActorPoolStrategy(max_concurrent_calls_per_actor=...)``): the engine serves the requests of all of them
    at the same time. ``batch_format`` is the default, NumPy.

    Columns of a batch:
      ``url``: ``/v1/completions`` or ``/v1/chat/completions``.
      ``body``: the request as JSON text. In a column of objects Arrow would give all rows the same keys.

    Columns that it adds; the others are handed on, and rows keep their order:
      ``status_code``: what the server would answer with; 200 unless the request is at fault.
      ``response``: the response or the error, as JSON text.
      ``completion_tokens``: number of generated tokens.

    Args:
      checkpoint: folder of the converted checkpoint, there on every node.
      config: of the engine.
      memory_gb: memory of each device for weights and cache together, in 10**9 bytes;
        ``config.memory_bytes`` if None.
      tensor_parallel: number of devices among which the replica divides the model.
      generation_config: whether the checkpoint says how tokens are drawn where a request leaves it open.

    Raises:
      AtomError: there is no checkpoint, or the sizes do not fit it or each other.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        config: EngineConfig = EngineConfig(),
        memory_gb: float | None = None,
        tensor_parallel: int = 1,
        generation_config: bool = True,
    ) -> None:
        enable_compilation_cache()
        mesh = None if tensor_parallel == 1 else first_devices(tensor_parallel)
        model = load(Path(checkpoint), mesh=mesh)
        engine = Engine(model, within_memory(model, config, memory_gb))
        engine.warm_up()
        served = served_model(model, engine, generation_config=generation_config)
        self._thread = AnsweringThread(engine, served, ahead=2 * config.max_num_seqs)

    async def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = zip(batch["url"], batch["body"], strict=True)
        futures = [asyncio.wrap_future(self._thread.submit(str(url), body)) for url, body in rows]
        results = await asyncio.gather(*futures)
        return {
            **batch,
            "status_code": [result.status for result in results],
            "response": [json.dumps(result.body) for result in results],
            "completion_tokens": [result.tokens for result in results],
        }


class AnsweringThread:
    """Answers requests of several callers at the same time, with one engine in a thread of its own.

    Args:
      engine: from now on only the thread uses it.
      model: the engine's model.
      ahead: see ``engine_answers``.
    """

    def __init__(self, engine: Engine, model: ServedModel, *, ahead: int) -> None:
        self._queue: queue.SimpleQueue[tuple[BatchRequest, Future[BatchResult]]] = queue.SimpleQueue()
        self._unanswered: dict[str, Future[BatchResult]] = {}
        self._failure: BaseException | None = None
        self._count = 0
        self._lock = threading.Lock()
        results = engine_answers(engine, model, self._requests(), ahead=ahead)
        threading.Thread(target=self._run, args=(results,), name="engine", daemon=True).start()

    def submit(self, url: str, body: object) -> Future[BatchResult]:
        """Gives a request to the engine; any thread may call it.

        Args:
          url: of the endpoint.
          body: the request as JSON text.

        Returns:
          Its result; an error of the engine is the future's exception.
        """
        future: Future[BatchResult] = Future()
        future.set_running_or_notify_cancel()  # a caller that gives up must not cancel it: the thread sets it
        try:
            request = _parse(url, body)
        except ApiError as error:
            future.set_result(BatchResult("", error.status, error.body))
            return future
        with self._lock:  # so that no request comes into the queue after the thread has emptied it
            if self._failure is not None:
                raise self._failure
            self._count += 1
            self._queue.put((dataclasses.replace(request, custom_id=str(self._count)), future))
        return future

    def _requests(self) -> Iterator[BatchRequest | None]:
        while True:
            try:
                request, future = self._queue.get(block=not self._unanswered)
            except queue.Empty:
                yield None
                continue
            self._unanswered[request.custom_id] = future
            yield request

    def _run(self, results: Iterator[BatchResult]) -> None:
        try:
            for result in results:
                self._unanswered.pop(result.custom_id).set_result(result)
        except BaseException as error:
            with self._lock:
                self._failure = error
            while not self._queue.empty():
                request, future = self._queue.get()
                self._unanswered[request.custom_id] = future
            for future in self._unanswered.values():
                future.set_exception(error)


def _parse(url: str, body: object) -> BatchRequest:
    """The request of a row, without an id.

    Raises:
      ApiError: there is no such endpoint, or the body is no JSON object.
    """
    if url not in REQUEST_KINDS:
        raise ApiError(
            404, f"url: one of {', '.join(REQUEST_KINDS)} expected, found {url[:128]!r}", param="url"
        )
    if not isinstance(body, str):
        raise ApiError(400, f"body: JSON text expected, found {type(body).__name__}")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, found {type(value).__name__}")
    return BatchRequest("", url, value)


@dataclasses.dataclass(frozen=True)
class Replicas:
    """How many replicas a cluster runs.

    Attributes:
      count: number of replicas.
      gpus: GPUs of each replica; 0 where it runs on CPUs.
    """

    count: int
    gpus: int


@contextlib.contextmanager
def connected(address: str, replicas: int | None, tensor_parallel: int = 1) -> Iterator[Replicas]:
    """Connects this process to a Ray cluster while the block runs. Nothing may write to stdout in it.

    Args:
      address: ``host:port`` of a cluster's head, ``auto`` for the cluster that this machine belongs to, or
        ``local`` for a new one of this machine alone, which ends with the block.
      replicas: how many are wanted. None: as many as the GPUs of the cluster suffice for, or one for each
        node if there are no GPUs.
      tensor_parallel: number of GPUs of a replica.

    Raises:
      AtomError: Ray is not installed, there is no such cluster, or it cannot run so many replicas.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else a new cluster reports to Ray's makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of what Ray's C++ code prints in this process
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise AtomError("batches on a Ray cluster need Ray: pip install 'atom-jax[ray]'") from error
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        # To stdout a thread of Ray prints the traceback of every worker that dies. What matters becomes one
        # line, by _failure; the rest is in Ray's own logs.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        _check_address(address)
        dashboard = False if address == "local" else None  # there is one in other clusters, or not
        try:
            ray.init(address, include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # ConnectionError, ValueError, RuntimeError and others
            raise AtomError(f"Ray cluster {address}: {one_line(error)}") from error
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            yield _replicas(address, replicas, nodes, tensor_parallel)
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raises AtomError if nobody listens at ``host:port``, which Ray would try for minutes."""
    found = re.fullmatch(r"\[?([^/]+?)\]?:(\d+)", address)
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), timeout=_CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise AtomError(f"Ray cluster {address}: {getattr(error, 'strerror', None) or error}") from error


def _replicas(
    address: str, wanted: int | None, nodes: Sequence[Mapping[str, float]], tensor_parallel: int = 1
) -> Replicas:
    """How many replicas a cluster of these ``nodes`` runs; see ``connected``."""
    gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    # The GPUs of a replica are those of one node.
    places = sum(int(node.get("GPU", 0)) // tensor_parallel for node in nodes)
    room = places if gpus else cpus
    count = wanted or (places if gpus else sum(node.get("CPU", 0) >= 1 for node in nodes))
    if not 0 < count <= room:  # Ray would wait for more nodes, for ever
        found = f"{gpus} GPUs" if gpus else f"{cpus} CPUs"
        each = f" of {tensor_parallel} GPUs" if tensor_parallel > 1 else ""
        raise AtomError(
            f"Ray cluster {address}: {count or 1} replicas{each} do not fit on its {found}; see --replicas"
        )
    return Replicas(count, tensor_parallel if gpus else 0)


def ray_answers(
    requests: Iterator[BatchRequest],
    *,
    replicas: Replicas,
    checkpoint: Path,
    config: EngineConfig,
    memory_gb: float | None,
    tensor_parallel: int,
    generation_config: bool,
) -> Iterator[BatchResult]:
    """Yields the result of each of ``requests``, as the replicas of the connected cluster complete them.

    When a replica or its node dies, Ray starts another one and gives it the blocks that were not answered.

    Args:
      requests: what to answer; Ray stores them.
      replicas: from ``connected``.
      checkpoint, config, memory_gb, tensor_parallel, generation_config: see ``BatchAnswerer``.

    Raises:
      AtomError: a replica cannot load the checkpoint, or its engine has failed.
    """
    import pyarrow as pa
    import ray
    import ray.data
    import ray.exceptions

    # All blocks of a replica fill its engine twice, as in a batch without Ray. A small block costs less to do
    # again when its replica has died.
    size = -(-2 * config.max_num_seqs // BLOCKS_AT_ONCE)
    blocks = []
    while chunk := list(itertools.islice(requests, size)):
        rows = [(each.custom_id, each.url, json.dumps(each.body)) for each in chunk]
        columns = dict(zip(("custom_id", "url", "body"), map(list, zip(*rows, strict=True)), strict=True))
        blocks.append(ray.put(pa.table(columns)))
    dataset = ray.data.from_arrow_refs(blocks).map_batches(
        BatchAnswerer,
        fn_constructor_kwargs={
            "checkpoint": str(checkpoint.resolve()),
            "config": config,
            "memory_gb": memory_gb,
            "tensor_parallel": tensor_parallel,
            "generation_config": generation_config,
        },
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(
            size=replicas.count,
            max_tasks_in_flight_per_actor=BLOCKS_AT_ONCE,
            max_concurrent_calls_per_actor=BLOCKS_AT_ONCE,
        ),
        num_cpus=1,
        num_gpus=replicas.gpus,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    try:
        for row in dataset.iter_rows():
            yield BatchResult(
                row["custom_id"], row["status_code"], json.loads(row["response"]), row["completion_tokens"]
            )
    except ray.exceptions.RayError as error:
        raise _failure(error) from error


def _failure(error: Exception) -> AtomError:
    """The error of a replica as one line: Ray hands errors of actors on as the text of their traceback."""
    text = str(error)
    found = re.findall(r"^(?:\w+\.)*AtomError: (.+)$", text, flags=re.MULTILINE)
    return AtomError(found[-1] if found else f"a replica failed: {text.strip().splitlines()[-1]}")
