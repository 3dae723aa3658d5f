"""The engine: prompts come and go at any time, and every step serves all that fit (docs/serving.md)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from atom_jax.checkpoint import Model
from atom_jax.engine.answers import Answer
from atom_jax.engine.buckets import make_buckets
from atom_jax.engine.requests import (
    Completion,
    EngineConfig,
    EngineStats,
    Output,
    RequestParams,
    SequenceState,
    TokenLogprobs,
)
from atom_jax.engine.runner import Chosen, Runner, page_bytes, unpack
from atom_jax.engine.scheduler import Plan, Scheduler, most_pages
from atom_jax.errors import AtomError
from atom_jax.generation import activation_dtype

_MAX_MODEL_LEN = 4096
_MAX_DEFAULT_BYTES = 4 * 2**30

_logger = logging.getLogger(__name__)


class _Dispatched(NamedTuple):
    """A step that the device works on, or has done."""

    plan: Plan
    reports: list[Any]  # arrays; the types of jax.Array lack is_ready


class Engine:
    """Serves requests by continuous batching over a paged cache.

    ``step`` plans and dispatches a step, then reads the results of the one before: the host plans while the
    device computes. The engine belongs to one thread.

    Attributes:
      max_model_len: most tokens of a prompt and its answer together; no more than the cache holds, unless
        every layer has a sliding window.
    """

    def __init__(self, model: Model, config: EngineConfig = EngineConfig()) -> None:
        """Allocates the cache; nothing is compiled before ``warm_up`` or the first step.

        Raises:
          AtomError: sizes that do not fit each other or the model.
        """
        self._model = model
        positions = model.config.max_position_embeddings
        self.max_model_len = config.max_model_len or min(positions, _MAX_MODEL_LEN)
        if self.max_model_len > positions:
            raise AtomError(f"max_model_len {self.max_model_len} exceeds the model's {positions} positions")
        self._num_pages = _num_pages(model, config, self.max_model_len)
        if self._num_pages < _most_pages(model, config, self.max_model_len):
            # No request may be longer than the cache.
            self.max_model_len = min(self.max_model_len, self._num_pages * config.page_size)
        buckets = make_buckets(config, self.max_model_len)
        self._scheduler = Scheduler(
            num_pages=self._num_pages,
            page_size=config.page_size,
            max_num_seqs=config.max_num_seqs,
            buckets=buckets,
            window=model.config.longest_window,
            prefix_caching=config.prefix_caching,
            deterministic=config.deterministic,
        )
        self._runner = Runner(
            model,
            num_pages=self._num_pages,
            page_size=config.page_size,
            slots=config.max_num_seqs,
            buckets=buckets,
        )
        self._requests: dict[str, tuple[SequenceState, Answer]] = {}
        self._pending: _Dispatched | None = None
        self._arrivals = 0
        self._prompt_tokens = self._generated_tokens = self._cached_tokens = self._steps = 0
        self._host_seconds = self._step_seconds = 0.0
        self._last_read = 0.0

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program, so that nothing compiles afterwards; ``report`` is told (done, all).

        Loads the tokenizer, too: the first request would wait for it.
        """
        self._model.tokenizer  # noqa: B018
        self._runner.warm_up(report)

    def add(self, request_id: str, prompt: Sequence[int], params: RequestParams) -> None:
        """Queues a request.

        Raises:
          AtomError: the id is in use, the prompt is empty or has ids that the model does not know, or prompt
            and answer together are longer than ``max_model_len``.
        """
        tokens = [int(token) for token in prompt]
        self._check(request_id, tokens, params)
        sequence = SequenceState(request_id, params, self._arrivals, tokens, len(tokens))
        answer = Answer(params, self._model.config.eos_token_ids, self._model.tokenizer, tokens)
        self._requests[request_id] = sequence, answer
        self._scheduler.add(sequence)
        self._arrivals += 1

    def _check(self, request_id: str, tokens: list[int], params: RequestParams) -> None:
        if request_id in self._requests:
            raise AtomError(f"request id {request_id!r} is in use")
        if not tokens:
            raise AtomError("the prompt is empty")
        vocabulary = self._model.config.vocab_size
        for what, ids in (("prompt", tokens), ("stop_ids", params.stop_ids)):
            if wrong := [token for token in ids if not 0 <= token < vocabulary]:
                raise AtomError(f"{what}: token ids must be 0 to {vocabulary - 1}, found {wrong[0]}")
        length = len(tokens) + params.max_new_tokens
        if length > self.max_model_len:
            raise AtomError(
                f"a prompt of {len(tokens)} tokens and {params.max_new_tokens} new ones are more than "
                f"max_model_len, {self.max_model_len}"
            )

    def abort(self, request_id: str) -> bool:
        """Ends a request at once: its pages are free, and no ``Output`` follows. False if there is none."""
        if request_id not in self._requests:
            return False
        sequence, _ = self._requests.pop(request_id)
        self._scheduler.remove(sequence)
        return True

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._requests) or self._pending is not None

    def step(self) -> list[Output]:
        """Dispatches the next step and returns what the one before has brought; often nothing at first."""
        began = time.perf_counter()
        before, self._pending = self._pending, None
        plan = self._scheduler.schedule()
        if plan.pieces:
            self._pending = _Dispatched(plan, self._runner.dispatch(plan))
            self._steps += 1
            self._count_host_time(before, began)
        outputs = [] if before is None else self._read(before)
        self._last_read = time.perf_counter()
        self._step_seconds += self._last_read - began
        return outputs

    def _count_host_time(self, before: _Dispatched | None, began: float) -> None:
        """Adds the time since which the device may have been without work, if it is without now."""
        if before is None:
            self._host_seconds += time.perf_counter() - began
        elif all(report.is_ready() for report in before.reports):
            self._host_seconds += time.perf_counter() - self._last_read

    def _read(self, step: _Dispatched) -> list[Output]:
        """Waits for a step's results and hands them out."""
        outputs = []
        results = [unpack(report) for report in jax.device_get(step.reports)]
        groups = [pieces for pieces in (step.plan.decode, step.plan.prefill) if pieces]
        for pieces, chosen in zip(groups, results, strict=True):
            for row, piece in enumerate(pieces):
                if piece.chooses and not piece.sequence.ended:
                    outputs.append(self._hand_out(piece.sequence, chosen, row))
        return outputs

    def _hand_out(self, sequence: SequenceState, chosen: Chosen, row: int) -> Output:
        """Adds one token to a request, and ends it if it is the last."""
        _, answer = self._requests[sequence.request_id]
        token = int(chosen.token[row])
        self._scheduler.receive(sequence, token)
        self._generated_tokens += 1
        text = answer.add(token)
        if answer.tokens == 1:
            self._prompt_tokens += sequence.prompt_tokens
            self._cached_tokens += sequence.cached_tokens or 0
        if answer.finish_reason is not None:
            del self._requests[sequence.request_id]
            self._scheduler.remove(sequence)
        return Output(
            request_id=sequence.request_id,
            token_ids=(token,),
            text=text,
            logprobs=_logprobs(sequence.params.logprobs, chosen, row),
            finish_reason=answer.finish_reason,
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=answer.tokens,
            cached_tokens=sequence.cached_tokens or 0,
        )

    def stats(self) -> EngineStats:
        """Counts and times; cheap."""
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            free_pages=self._scheduler.pool.available,
            num_pages=self._num_pages,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            host_seconds=self._host_seconds,
            step_seconds=self._step_seconds,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: RequestParams | Sequence[RequestParams]
    ) -> list[Completion]:
        """Answers all prompts, batched as they fit, and returns when the last one is done.

        Args:
          prompts: token ids.
          params: for all prompts, or one for each.

        Raises:
          AtomError: as ``add``, before anything is computed; the numbers of prompts and params differ; other
            requests are in progress.
        """
        each = [params] * len(prompts) if isinstance(params, RequestParams) else list(params)
        if len(each) != len(prompts):
            raise AtomError(f"{len(prompts)} prompts, but {len(each)} params")
        if self._requests:
            raise AtomError("generate needs an engine without other requests in progress")
        ids = [f"prompt {number}" for number in range(len(prompts))]
        for request_id, prompt, settings in zip(ids, prompts, each, strict=True):
            try:
                self.add(request_id, prompt, settings)
            except AtomError as error:
                for added in list(self._requests):
                    self.abort(added)
                raise AtomError(f"{request_id}: {error}") from error
        outputs: dict[str, list[Output]] = {request_id: [] for request_id in ids}
        while self.has_work:
            for output in self.step():
                outputs[output.request_id].append(output)
        return [_completion(outputs[request_id]) for request_id in ids]


def _logprobs(wanted: int | None, chosen: Chosen, row: int) -> tuple[TokenLogprobs, ...]:
    if wanted is None:
        return ()
    top = zip(chosen.top_ids[row, :wanted].tolist(), chosen.top_logprobs[row, :wanted].tolist(), strict=True)
    return (TokenLogprobs(int(chosen.token[row]), float(chosen.logprob[row]), tuple(top)),)


def _completion(outputs: list[Output]) -> Completion:
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Completion(
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        finish_reason=reason,
    )


def _most_pages(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Pages that the longest request has at a time: those of a window and a step, if it is longer."""
    pages, window = -(-max_model_len // config.page_size), model.config.longest_window
    return pages if window is None else min(pages, most_pages(window, config.token_budget, config.page_size))


def _num_pages(model: Model, config: EngineConfig, max_model_len: int) -> int:
    """Pages of the cache, from whichever size the configuration gives."""
    if config.num_pages is not None:
        return config.num_pages
    size = page_bytes(model.config, config.page_size, activation_dtype(model.params, model.config))
    if config.memory_bytes is not None:
        if config.memory_bytes < size:
            raise AtomError(f"memory_bytes {config.memory_bytes} is less than a page, {size} bytes")
        return config.memory_bytes // size
    wanted = config.max_num_seqs * _most_pages(model, config, max_model_len)
    pages = max(1, min(wanted, _MAX_DEFAULT_BYTES // size))
    _logger.info("%d pages of %d tokens, %.2f GiB", pages, config.page_size, pages * size / 2**30)
    return pages
