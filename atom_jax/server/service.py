"""What the routes share: the engine's thread, the model, the limits, the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from atom_jax.engine import Engine
from atom_jax.openai.engine_requests import make_engine_requests
from atom_jax.openai.errors import ApiError
from atom_jax.openai.requests import ApiRequest
from atom_jax.openai.responses import ApiResponse
from atom_jax.openai.served_model import ServedModel
from atom_jax.server.config import ServerConfig
from atom_jax.server.engine_thread import EngineThread, Latency, OutputStream
from atom_jax.server.metrics import Metrics


class Service:
    """What the routes share.

    Args:
      config: limits and names of the server.
      engine: from now on only the engine's thread uses it.
      model: the engine's model.

    Attributes:
      engine: the thread of the engine.
      metrics: what ``/metrics`` shows.
      draining: whether the server will end; ``/health`` says so.
      closed: whether new requests are refused because of that.
      created: when the service was made, in seconds since 1970.
      on_failure: called when the engine has failed.
      on_ready: called when requests are answered from now on, in the thread that compiles.
      on_compiled: called when all programs are compiled, in that thread.
    """

    def __init__(self, config: ServerConfig, engine: Engine, model: ServedModel) -> None:
        self.config, self.model = config, model
        self.on_failure: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_compiled: Callable[[], None] = lambda: None
        self.engine = EngineThread(
            engine,
            on_progress=self._observe,
            on_failure=lambda: self.on_failure(),
            on_ready=lambda: self.on_ready(),
            prepare=self._prepare,
            on_compiled=lambda: self.on_compiled(),
        )
        self.metrics = Metrics(lambda: self.engine.stats, self.engine.compilation, config.page_size)
        self.draining = self.closed = False
        self.created = int(time.time())

    @property
    def state(self) -> str:
        """What ``/health`` tells; a load balancer should send requests while it is "ok"."""
        if self.engine.failure:
            return "failed"
        if self.draining:
            return "draining"
        return "ok" if self.engine.compilation.ready else "starting"

    def _prepare(self) -> None:
        """Makes what the first requests of some kinds would have to wait for."""
        self.model.literal_tokens  # noqa: B018
        self.model.token_bound  # noqa: B018

    async def submit(self, request: ApiRequest) -> tuple[ApiResponse, OutputStream]:
        """Gives a request to the engine.

        Returns:
          The response to fill, and the stream of the engine's outputs, which the caller must close.

        Raises:
          ApiError: the request cannot be answered, or not now.
          AtomError: the engine refuses the request.
        """
        config = self.config
        self.check_name(request.model)
        count = request.num_choices
        if count > config.max_in_flight:
            field = "n" if (request.n or 1) > 1 else "prompt"
            message = f"{count} answers are more than this server gives at once, {config.max_in_flight}"
            raise ApiError(400, f"{field}: {message}", param=field)
        self._check_queue(count)  # a first time, so that a full queue costs no tokenizing
        engine_requests = await asyncio.to_thread(make_engine_requests, request, self.model)
        self._check_queue(count)  # again: meanwhile other requests may have filled the queue
        output_stream = await self.engine.submit(engine_requests.choices, config.request_timeout)
        return ApiResponse(request, engine_requests, self.model), output_stream

    def check_name(self, name: str) -> None:
        """Raises ApiError unless ``name`` is that of the model."""
        if name != self.config.model_name:
            message = f"the model {name[:128]!r} does not exist; this server has {self.config.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _check_queue(self, count: int) -> None:
        """Raises ApiError if there is no room for ``count`` more answers."""
        if self.engine.in_flight + count > self.config.max_in_flight:
            message = "the queue is full; try again later"
            raise ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})

    def _observe(self, latency: Latency) -> None:
        """Puts the times of a request into the metrics: after its first token, and when it has ended."""
        metrics = self.metrics
        if latency.first_token is None:
            return
        if latency.ended is None or latency.ended == latency.first_token:
            metrics.first_token.observe(latency.first_token - latency.submitted)
        if latency.ended is not None:
            metrics.whole.observe(latency.ended - latency.submitted)
            if latency.tokens > 1:
                metrics.per_output_token.observe((latency.ended - latency.first_token) / (latency.tokens - 1))
