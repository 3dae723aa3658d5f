"""The engine: requests come and go at any time, and each step serves as many as fit (docs/serving.md)."""

from __future__ import annotations

import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import Sequence

import jax

from atom_jax.checkpoint import Model
from atom_jax.engine.answer_text import AnswerText
from atom_jax.engine.buckets import Shape, make_buckets
from atom_jax.engine.config import EngineConfig
from atom_jax.engine.grammar import TokenMask, next_mask
from atom_jax.engine.outputs import Completion, FinishReason, Output, joined
from atom_jax.engine.pace import Pace
from atom_jax.engine.request_params import RequestParams
from atom_jax.engine.results import Chosen, token_logprobs, unpack
from atom_jax.engine.runner import Dispatched, Runner
from atom_jax.engine.scheduler import Scheduler
from atom_jax.engine.sequence import SequenceState
from atom_jax.engine.sizes import implementations, is_batch_invariant, most_pages_of_request, num_pages
from atom_jax.engine.stats import EngineStats
from atom_jax.errors import AtomError, one_line
from atom_jax.progress import Progress
from pallas_kernels.devices import READS_CONTEXT_ONLY

_MAX_MODEL_LEN = 4096

_logger = logging.getLogger(__name__)


class Engine:
    """Serves requests by continuous batching over a paged cache.

    ``step`` plans a step and dispatches it to the device, then reads the results of the step before it. So
    the host plans one step while the device computes another. Only one thread may use an engine.

    Programs run the kernels of the ``use_implementation`` in which the engine was made, in any thread.

    If ``step`` raises, nobody knows what of the step was done. The engine then refuses to go on: a new one
    must be made.

    Attributes:
      max_model_len: the most tokens of a prompt and its answer together. It is at most what the cache holds,
        unless every layer has a sliding window.
    """

    def __init__(self, model: Model, config: EngineConfig = EngineConfig()) -> None:
        """Allocates the cache. Programs are compiled by ``warm_up``, or when a step first needs them.

        Raises:
          AtomError: the sizes in ``config`` do not fit each other or the model.
        """
        self._model = model
        positions = model.config.max_position_embeddings
        self.max_model_len = config.max_model_len or min(positions, _MAX_MODEL_LEN)
        if self.max_model_len > positions:
            raise AtomError(f"max_model_len {self.max_model_len} exceeds the model's {positions} positions")
        self._num_pages = num_pages(model, config, self.max_model_len)
        if self._num_pages < most_pages_of_request(model, config, self.max_model_len):
            # A request must not be longer than the cache.
            self.max_model_len = min(self.max_model_len, self._num_pages * config.page_size)
        run = implementations(model, config, self.max_model_len)
        if config.deterministic and is_batch_invariant(model, run):
            config = dataclasses.replace(config, deterministic=False)  # the kernels see to it
        buckets = make_buckets(config, self.max_model_len, one_table=run <= READS_CONTEXT_ONLY)
        self._pace = Pace(buckets, config.max_decode_delay)
        self._make_scheduler = functools.partial(
            Scheduler,
            num_pages=self._num_pages,
            page_size=config.page_size,
            max_num_seqs=config.max_num_seqs,
            buckets=buckets,
            window=model.config.longest_window,
            prefix_caching=config.prefix_caching,
            deterministic=config.deterministic,
            prefill_limit=self._pace.prefill_limit,
        )
        self._scheduler = self._make_scheduler()
        self._runner = Runner(
            model,
            num_pages=self._num_pages,
            page_size=config.page_size,
            slots=config.max_num_seqs,
            buckets=buckets,
        )
        self._requests: dict[str, tuple[SequenceState, AnswerText]] = {}
        self._pending: Dispatched | None = None
        self._failure: BaseException | None = None
        self._preemptions = 0  # of schedulers before this one
        self._arrivals = 0
        self._prompt_tokens = self._generated_tokens = self._cached_tokens = self._steps = 0
        self._host_seconds = self._step_seconds = 0.0
        self._last_read = 0.0

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles every program, so that no request has to wait for a compilation.

        Loads the tokenizer too, for the same reason.

        Args:
          progress: called with (programs compiled, all programs).
        """
        self._model.tokenizer  # noqa: B018
        self._runner.warm_up(progress)

    def programs(self) -> list[Shape]:
        """The programs that are not compiled yet, those first that the first requests need.

        ``compile`` compiles one. Until it is there, a larger one serves in its place, if there is one.
        """
        return self._runner.programs()

    def first_programs(self) -> list[Shape]:
        """Those of ``programs`` to compile first: the fewest with which no request waits for a compilation.

        In deterministic mode, where no program serves in another's place, those that the first request needs.
        """
        return self._runner.first_programs()

    def compile(self, program: Shape) -> None:
        """Compiles one of ``programs``. It may be called in any thread, unlike other methods."""
        self._runner.compile(program)

    def compile_updates(self) -> None:
        """Compiles the small programs for penalties and grammars. It may be called in any thread."""
        self._runner.compile_updates()

    def add(self, request_id: str, prompt: Sequence[int], params: RequestParams) -> None:
        """Queues a request.

        Args:
          request_id: any text that no other unfinished request has; ``Output.request_id`` repeats it.
          prompt: token ids.
          params: how to continue the prompt.

        Raises:
          AtomError: the id is in use, the prompt is empty or has ids that the model does not know, prompt and
            answer together may be longer than ``max_model_len``, the grammar allows no token, or a step has
            failed.
        """
        self._refuse_after_failure()
        tokens = [int(token) for token in prompt]
        self._check(request_id, tokens, params)
        seed = secrets.randbits(64) if params.seed is None else params.seed
        sequence = SequenceState(request_id, params, self._arrivals, tokens, len(tokens), seed)
        if params.grammar is not None:
            sequence.token_mask = params.grammar.start()
            sequence.mask = next_mask(sequence.token_mask, self._model.config.vocab_size)
        answer = AnswerText(params, self._model.config.eos_token_ids, self._model.tokenizer, tokens)
        self._arrivals += 1
        self._scheduler.add(sequence)
        self._requests[request_id] = sequence, answer

    def _check(self, request_id: str, tokens: list[int], params: RequestParams) -> None:
        if request_id in self._requests:
            raise AtomError(f"request id {request_id!r} is in use")
        if not tokens:
            raise AtomError("the prompt is empty")
        vocabulary = self._model.config.vocab_size
        for what, ids in (("prompt", tokens), ("stop_ids", params.stop_ids)):
            if wrong := [token for token in ids if not 0 <= token < vocabulary]:
                raise AtomError(f"{what}: token ids must be 0 to {vocabulary - 1}, found {wrong[0]}")
        params.sampling.check_vocabulary(vocabulary)
        length = len(tokens) + params.max_new_tokens
        if length > self.max_model_len:
            raise AtomError(
                f"a prompt of {len(tokens)} tokens and {params.max_new_tokens} new ones are more than "
                f"max_model_len, {self.max_model_len}"
            )

    def abort(self, request_id: str) -> bool:
        """Ends a request at once: its pages become free, and no ``Output`` follows.

        Returns:
          False if there is no unfinished request with this id.
        """
        if request_id not in self._requests:
            return False
        sequence, _ = self._requests.pop(request_id)
        self._scheduler.remove(sequence)
        return True

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._requests) or self._pending is not None

    def _refuse_after_failure(self) -> None:
        if self._failure is not None:
            raise AtomError(
                f"a step of this engine has failed ({type(self._failure).__name__}: "
                f"{one_line(self._failure)}); make a new engine"
            )

    def step(self) -> list[Output]:
        """Dispatches the next step and returns the outputs of the step before it, which may be none.

        Whatever it raises, Ctrl-C included, the engine cannot be used afterwards.

        Raises:
          AtomError: an earlier step has failed.
        """
        self._refuse_after_failure()
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            raise

    def _step(self) -> list[Output]:
        began = time.perf_counter()
        before, self._pending = self._pending, None
        plan = self._scheduler.schedule()
        if plan.pieces:
            self._pending = self._runner.dispatch(plan)
            self._steps += 1
            self._count_host_time(before, began)
        outputs = [] if before is None else self._read(before)
        self._last_read = time.perf_counter()
        self._step_seconds += self._last_read - began
        return outputs

    def _count_host_time(self, before: Dispatched | None, began: float) -> None:
        """Adds to ``host_seconds`` the time during which the device may have had no work.

        Args:
          before: the step that was dispatched before this one, None if there is none.
          began: when this call of ``step`` began.
        """
        if before is None:
            self._host_seconds += time.perf_counter() - began
        elif all(array.is_ready() for _, array in (*before.programs, *before.scores)):
            # The device has finished, nobody knows when. All time since the last read of results is counted.
            self._host_seconds += time.perf_counter() - self._last_read

    def _read(self, step: Dispatched) -> list[Output]:
        """Waits for the results of a step and turns them into outputs."""
        outputs = []
        self._pace.wait(step)
        programs, scores = step.programs, step.scores
        arrays = jax.device_get([array for _, array in (*programs, *scores)])
        results = [unpack(array) for array in arrays]
        for (piece, _), scored in zip(scores, results[len(programs) :], strict=True):
            wanted = piece.sequence.params.prompt_logprobs
            for position in piece.scored:
                piece.sequence.prompt_logprobs += token_logprobs(wanted, scored, position - piece.start)
        groups = [pieces for pieces in (step.plan.decode, step.plan.prefill) if pieces]
        for pieces, chosen in zip(groups, results[: len(programs)], strict=True):
            for row, piece in enumerate(pieces):
                if piece.sequence.ended:
                    continue
                if piece.chooses:
                    outputs.append(self._output(piece.sequence, chosen, row))
                elif piece.ends_prompt and not piece.sequence.params.max_new_tokens:
                    outputs.append(self._without_answer(piece.sequence))
        return outputs

    def _output(self, sequence: SequenceState, chosen: Chosen, row: int) -> Output:
        """Adds the token that was chosen for a row to its request, and ends the request if it is the last."""
        _, answer = self._requests[sequence.request_id]
        token = int(chosen.token[row])
        self._scheduler.receive(sequence, token)
        self._generated_tokens += 1
        text = answer.add(token)
        first = answer.tokens == 1
        if first:
            self._count_prompt(sequence)
        if answer.finish_reason is None and sequence.token_mask is not None:
            reason = self._advance_grammar(sequence, sequence.token_mask, token)
            text += "" if reason is None else answer.end(reason)
        if answer.finish_reason is not None:
            self._end(sequence)
        return Output(
            request_id=sequence.request_id,
            token_ids=(token,),
            text=text,
            logprobs=token_logprobs(sequence.params.logprobs, chosen, row),
            finish_reason=answer.finish_reason,
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=answer.tokens,
            cached_tokens=sequence.cached_tokens or 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
        )

    def _without_answer(self, sequence: SequenceState) -> Output:
        """Ends a request that only asks for the log-probabilities of its prompt."""
        self._count_prompt(sequence)
        self._end(sequence)
        return Output(
            request_id=sequence.request_id,
            token_ids=(),
            text="",
            logprobs=(),
            finish_reason="length",
            prompt_tokens=sequence.prompt_tokens,
            completion_tokens=0,
            cached_tokens=sequence.cached_tokens or 0,
            prompt_logprobs=tuple(sequence.prompt_logprobs),
        )

    def _count_prompt(self, sequence: SequenceState) -> None:
        self._prompt_tokens += sequence.prompt_tokens
        self._cached_tokens += sequence.cached_tokens or 0

    def _end(self, sequence: SequenceState) -> None:
        del self._requests[sequence.request_id]
        self._scheduler.remove(sequence)

    def _advance_grammar(
        self, sequence: SequenceState, token_mask: TokenMask, token: int
    ) -> FinishReason | None:
        """Takes the next mask of a sequence from its grammar; returns why the answer ends, if it does."""
        try:
            token_mask.accept(token)
            if token_mask.ended:
                return "stop"
            sequence.mask = next_mask(token_mask, self._model.config.vocab_size)
        except Exception as error:  # of a library: it must not end the engine, and with it all other answers
            _logger.warning("request %s: its grammar has failed: %s", sequence.request_id, one_line(error))
            return "abort"
        return None

    def stats(self) -> EngineStats:
        """The engine's counts and times now. Cheap enough to call after every step."""
        return EngineStats(
            waiting=len(self._scheduler.waiting),
            running=len(self._scheduler.running),
            free_pages=self._scheduler.pool.available,
            num_pages=self._num_pages,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions + self._scheduler.preemptions,
            steps=self._steps,
            host_seconds=self._host_seconds,
            step_seconds=self._step_seconds,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: RequestParams | Sequence[RequestParams]
    ) -> list[Completion]:
        """Answers all prompts, as many at a time as fit, and returns when all answers are complete.

        Ended by Ctrl-C (KeyboardInterrupt) at any moment, it leaves an engine without requests, whose prefix
        cache is empty. It can be used again.

        Args:
          prompts: token ids.
          params: for all prompts, or one for each.

        Raises:
          AtomError: ``add`` refuses a prompt (then none is computed), the numbers of prompts and params
            differ, the engine has other unfinished requests, or a step has failed.
        """
        self._refuse_after_failure()
        each = [params] * len(prompts) if isinstance(params, RequestParams) else list(params)
        if len(each) != len(prompts):
            raise AtomError(f"{len(prompts)} prompts, but {len(each)} params")
        if self._requests:
            raise AtomError("generate needs an engine without other requests in progress")
        ids = [f"prompt {number}" for number in range(len(prompts))]
        try:
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
            return [joined(outputs[request_id]) for request_id in ids]
        except AtomError:
            raise  # nothing was left behind, or a step has failed
        except BaseException as error:
            if self._failure is None or not isinstance(error, Exception):
                self._drop_everything(error)
            raise

    def _drop_everything(self, error: BaseException) -> None:
        """Drops all requests, what is in flight and the prefix cache: they may be half changed.

        Args:
          error: what has interrupted the engine. It counts as a failure should this be interrupted, too.
        """
        self._failure = error
        self._preemptions += self._scheduler.preemptions
        self._requests.clear()
        self._pending = None
        self._scheduler = self._make_scheduler()
        self._runner.reset()
        self._failure = None
