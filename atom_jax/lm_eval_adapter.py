"""Runs tasks of lm-eval (EleutherAI's lm-evaluation-harness, the extra ``eval``) on a checkpoint.

Importing this module imports ``lm_eval``, and raises AtomError if it is not installed. lm-eval is an optional
dependency that type checkers may not find, so its objects have the type Any here.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, SupportsFloat, TypedDict

import jax
import numpy as np

from atom_jax.checkpoint import Model
from atom_jax.errors import AtomError
from atom_jax.hosts import call, call_stream
from atom_jax.progress import StageProgress
from atom_jax.sampling import SamplingParams
from atom_jax.scoring import Scored, score

# lm-eval's class of a request; its ``args`` are the arguments for a method of the language model.
Instance = Any
# A task or a group of tasks of lm-eval.
Task = Any

# lm-eval's own default for tasks that do not say how much to generate.
_MAX_NEW_TOKENS = 256


def _lm_eval(module: str) -> ModuleType:
    """Imports the module ``lm_eval.<module>``; AtomError if lm-eval is not installed."""
    try:
        importlib.import_module("lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise  # lm-eval is installed, but something it needs is not
        raise AtomError("tasks need lm-eval: pip install 'atom-jax[eval]'") from None
    return importlib.import_module(f"lm_eval.{module}")


_TemplateLM: Any = _lm_eval("api.model").TemplateLM


@dataclasses.dataclass(frozen=True)
class _Generation:
    """The parameters of a ``generate_until`` request; requests with equal parameters run in one batch.

    Attributes:
      until: stop strings.
      max_new_tokens: the text ends after this many tokens at the latest.
      sampling: how each token is chosen.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: SamplingParams


class AtomLM(_TemplateLM):
    """A loaded checkpoint as a language model of lm-eval: it scores continuations and generates texts.

    Contexts and continuations are tokenized as in lm-eval's own model for transformers, so that the results
    can be compared: the tokens of a continuation are those that it adds to the tokens of its context, an
    empty context is replaced by the BOS token (EOS if there is no BOS), and the start of a context that is
    too long is cut off.

    Args:
      model: model from ``atom_jax.load``; its checkpoint must have a tokenizer.
      batch_size: number of sequences that are computed at a time.
      seed: seed of the random draws in tasks that sample. The draws for a request depend on it, on the
        prompt, on its parameters and on how many equal requests came before it in the same call; so the
        repeats of a request are independent of each other, and no other request or batch size matters.
      report: called with (stage, done, total).
    """

    def __init__(
        self, model: Model, *, batch_size: int = 8, seed: int = 0, report: StageProgress | None = None
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise AtomError(f"batch size must be at least 1, found {batch_size}")
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.tokenizer = model.tokenizer
        self._report = report or (lambda stage, done, total: None)

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise AtomError(f"the tokenizer of {self.model.path} has no end-of-sequence token")
        return eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return bos if isinstance(bos, int) else self.eot_token_id

    def _decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        text = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)  # lists of texts come of lists of lists
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the tokenizer's special tokens unless ``string`` begins with BOS already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._decode([self.prefix_token_id]))
        # verbose=False: no warning for a text longer than the model's context, which is cut later.
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether greedy decoding would generate it.

        Args:
          requests: for each continuation (context and continuation as text, token ids of the context, token
            ids of the continuation).
          kwargs: options of lm-eval, which are ignored.
        """
        pairs = []
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise AtomError(
                    f"a continuation of {len(continuation)} tokens cannot be scored with a context of "
                    f"{self.max_length}: {str(text)[:80]!r}"
                )
            # One token more than max_length fits, because the model never reads the last token.
            keep = self.max_length + 1 - len(continuation)
            pairs.append((context[-keep:], continuation))
        return [(each.log_likelihood, each.is_greedy) for each in self._score(pairs, "scored continuations")]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], stage: str) -> list[Scored]:
        return call(
            score,
            self.model,
            pairs,
            batch_size=self.batch_size,
            progress=lambda done, total: self._report(stage, done, total),
        )

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each text as a whole.

        A text that is longer than the model's context is scored in windows of the context's length.
        """
        utils = _lm_eval("utils")
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                pairs.append(utils.make_disjoint_window(window))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, scored in zip(owners, self._score(pairs, "scored windows"), strict=True):
            totals[number] += scored.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text generated for each request, in order, up to its first stop string."""
        groups: dict[_Generation, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_generation(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        for generation, members in groups.items():
            room = self.max_length - generation.max_new_tokens
            if room < 1:
                raise AtomError(
                    f"{generation.max_new_tokens} new tokens leave no room for a prompt in a context of "
                    f"{self.max_length}"
                )
            prompts, seeds = {}, {}
            repeats: collections.Counter[tuple[int, ...]] = collections.Counter()
            for number in members:
                ids = self.tok_encode(requests[number].args[0])[-room:] or [self.prefix_token_id]
                prompts[number] = ids
                seeds[number] = _seed(self.seed, ids, generation, repeats[tuple(ids)])
                repeats[tuple(ids)] += 1
            members = sorted(members, key=lambda number: -len(prompts[number]))
            for start in range(0, len(members), self.batch_size):
                some = members[start : start + self.batch_size]
                # The last batch is filled up with copies of its last prompt, because a smaller batch would be
                # compiled again.
                fill = min(self.batch_size, len(members)) - len(some)
                rows = [*some, *fill * some[-1:]]
                answers = self._generate(
                    [prompts[number] for number in rows], [seeds[number] for number in rows], generation
                )
                texts |= zip(some, answers, strict=False)
                self._report("generated texts", len(texts), len(requests))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, prompts: list[list[int]], seeds: list[int], generation: _Generation) -> list[str]:
        """The texts for one batch of prompts, generated until each has ended or has a stop string."""
        tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        config = self.model.config
        ends = {*config.eos_token_ids, self.eot_token_id}
        rows: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        done = [False] * len(prompts)
        for step, _ in call_stream(
            self.model,
            tokens,
            np.asarray([len(prompt) for prompt in prompts]),
            max_new_tokens=generation.max_new_tokens,
            key=jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32)),
            sampling=generation.sampling,
            stop_ids=(self.eot_token_id,),
        ):
            for place, token in enumerate(step.tolist()):
                if done[place]:
                    continue
                if token in ends:
                    done[place] = True
                    continue
                rows[place].append(token)
                text = self._decode(rows[place], skip_special_tokens=True)
                texts[place], done[place] = _until(text, generation.until)
            if all(done):
                break
        return texts


def _seed(seed: int, prompt: list[int], generation: _Generation, repeat: int) -> int:
    """The seed, 32 bits, of one of several equal requests."""
    text = repr((seed, prompt, generation, repeat))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def _until(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The part of ``text`` before its first stop string, and whether it has a stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _generation(generation_kwargs: Mapping[str, object]) -> _Generation:
    """The parameters in a task's ``generation_kwargs``.

    Raises:
      AtomError: an option is not supported.
    """
    options = dict(_lm_eval("models.utils").normalize_gen_kwargs(generation_kwargs, _MAX_NEW_TOKENS))
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    max_new_tokens = options.pop("max_gen_toks")
    temperature, sample = options.pop("temperature", 0.0), options.pop("do_sample")
    top_k, top_p = options.pop("top_k", 0), options.pop("top_p", 1.0)
    sampling = SamplingParams(temperature, top_k, top_p) if sample else SamplingParams()
    if options.pop("num_beams", 1) != 1:
        raise AtomError("generation with beams is not supported")
    if options:
        raise AtomError(f"generation options that are not supported: {', '.join(sorted(options))}")
    return _Generation(tuple(stop for stop in until if stop), max_new_tokens, sampling)


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> list[Task]:
    """Loads tasks and groups of tasks of lm-eval, with their data sets.

    Args:
      names: names of tasks or groups, or patterns such as ``mmlu_*``.
      include_path: a folder with YAML files of further tasks; None for lm-eval's own tasks only.

    Raises:
      AtomError: no task has one of the names, or a data set cannot be loaded, e.g. without a network.
    """
    if include_path is not None and not include_path.is_dir():
        raise AtomError(f"{include_path}: no such folder")
    names = [name.strip() for name in names]
    make_manager = _lm_eval("tasks").TaskManager
    # Reading the index of lm-eval's own 15,000 tasks takes many seconds.
    manager = make_manager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = make_manager(include_path=include_path)
    matches = {name: manager.match_tasks([name]) for name in names}
    if missing := [name for name, found in matches.items() if not found]:
        raise AtomError(f"lm-eval has no task {', '.join(map(repr, missing))}; --include-path adds a folder")
    tasks: dict[str, Task] = {}
    for name in dict.fromkeys(match for found in matches.values() for match in found):
        try:
            loaded = manager.load([name])
        except Exception as error:  # lm-eval and datasets raise many types for an unusable task or data set
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise AtomError(f"task {name}: its data cannot be loaded: {reason}") from error
        group = loaded["groups"].get(name)
        tasks |= loaded["tasks"] if group is None else {name: group}
    return list(tasks.values())


class Metric(TypedDict):
    """The value of a metric and its standard error; None for one that is not a finite number."""

    value: float | None
    stderr: float | None


class TaskResults(TypedDict):
    """What ``run_tasks`` returns, as JSON data.

    Attributes:
      results: the metrics of each task or group, by its name and the name of the metric.
      examples: number of examples of each task.
      num_fewshot: for each task, the number of solved examples before each question.
      versions: version of each task.
      lm_eval: version of lm-eval.
      seconds: time of the evaluation.
    """

    results: dict[str, dict[str, Metric]]
    examples: dict[str, int]
    num_fewshot: dict[str, int]
    versions: dict[str, object]
    lm_eval: str
    seconds: float


def run_tasks(
    lm: AtomLM, tasks: Sequence[Task], *, limit: int | None = None, num_fewshot: int | None = None
) -> TaskResults:
    """Evaluates a model on tasks.

    Args:
      lm: the model.
      tasks: tasks from ``load_tasks``.
      limit: use only the first ``limit`` examples of each task; None for all.
      num_fewshot: number of solved examples before each question; None for the task's own number.
    """
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for results
        found = _lm_eval("evaluator").simple_evaluate(
            model=lm, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, log_samples=False
        )
    metrics = {**found["results"], **found.get("groups", {})}
    return {
        "results": {name: _metrics(values) for name, values in metrics.items()},
        "examples": {name: count["effective"] for name, count in found["n-samples"].items()},
        "num_fewshot": found["n-shot"],
        "versions": found["versions"],
        "lm_eval": importlib.metadata.version("lm_eval"),
        "seconds": time.perf_counter() - started,
    }


def _metrics(values: Mapping[str, object]) -> dict[str, Metric]:
    """Joins lm-eval's entries for a metric, e.g. "acc,none" and "acc_stderr,none", into one entry "acc"."""
    result: dict[str, Metric] = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        name = metric if chosen == "none" else key
        result[name] = {
            "value": _finite_or_none(value),
            "stderr": _finite_or_none(values.get(f"{metric}_stderr,{chosen}")),
        }
    return result


def _finite_or_none(value: object) -> float | None:
    """A value as a float; None if it is no finite number, as "N/A" or the standard error of one example."""
    if not isinstance(value, SupportsFloat):
        return None
    number = float(value)
    return number if math.isfinite(number) else None
