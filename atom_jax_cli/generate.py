"""``atom-jax generate``: text from a checkpoint, streamed for one prompt, batched for many."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atom_jax.errors import AtomError
from atom_jax_cli.console import JsonOption, note, print_json, stderr, stdout
from atom_jax_cli.model import CheckpointArgument, TensorParallelOption, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from atom_jax.checkpoint import Model
    from atom_jax.sampling import SamplingParams

_SAMPLING = "Sampling"


def generate(
    checkpoint: CheckpointArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="Text to continue.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Another prompt; repeat it for a batch.", show_default="none")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            help='One prompt a line; in a .jsonl file, the "prompt" of each line.', show_default="none"
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="For each prompt.")] = 128,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token.", rich_help_panel=_SAMPLING)
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(help="Among the k most likely; 0: all.", rich_help_panel=_SAMPLING)
    ] = 0,
    top_p: Annotated[
        float, typer.Option(help="Among those with this probability together.", rich_help_panel=_SAMPLING)
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Of the random draws.", min=0, max=2**32 - 1, rich_help_panel=_SAMPLING)
    ] = 0,
    stop_id: Annotated[
        list[int] | None,
        typer.Option(
            help="Token that ends a text, besides the model's own; repeatable.", show_default="none"
        ),
    ] = None,
    tensor_parallel: TensorParallelOption = 1,
    json_output: JsonOption = False,
) -> None:
    """Continue one or more prompts."""
    prompts = _prompts(([] if text is None else [text]) + (prompt or []), prompts_file)

    from atom_jax import SamplingParams

    sampling = SamplingParams(temperature, top_k, top_p)
    model = load_model(checkpoint, tensor_parallel)
    ids = [encode_prompt(model.tokenizer, text, chat=chat) for text in prompts]
    generation = Generation(model, max_new_tokens, sampling, seed, stop_id or ())
    if len(prompts) == 1:
        tokens, timing = generation.stream(ids[0], echo=not json_output)
        rows = [tokens]
    else:
        with stderr.status(f"Generating for {len(prompts)} prompts"):
            rows, timing = generation.batch(ids)
    results = [generation.result(*each) for each in zip(prompts, ids, rows, strict=True)]
    if json_output:
        print_json({"results": results, **timing})
    elif len(prompts) > 1:
        for number, result in enumerate(results, 1):
            stdout.rule(f"{number}", style="dim")
            stdout.print(result["prompt"], markup=False, highlight=False, soft_wrap=True, style="dim")
            stdout.print(result["text"], markup=False, highlight=False, soft_wrap=True)
    note(describe_timing(timing))


def _prompts(given: list[str], file: Path | None) -> list[str]:
    prompts = given + (_read_prompts(file) if file is not None else [])
    if not prompts:
        raise AtomError("no prompt: give TEXT after the checkpoint, --prompt TEXT or --prompts-file FILE")
    return prompts


def _read_prompts(path: Path) -> list[str]:
    """The prompts of a file, empty lines left out; AtomError naming the file and line otherwise."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise AtomError(f"{path}: is not UTF-8 text") from None
    prompts = [
        _json_prompt(path, number, line) if path.suffix.lower() == ".jsonl" else line
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise AtomError(f"{path}: holds no prompt")
    return prompts


def _json_prompt(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise AtomError(f"{path}: line {number} is not JSON: {error}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise AtomError(f'{path}: line {number} has no "prompt" string')
    return prompt


def encode_prompt(tokenizer: PreTrainedTokenizerFast, text: str, *, chat: bool) -> list[int]:
    """Token ids of a prompt, or of a first message to an assistant.

    Raises:
      AtomError: no tokens, not Unicode, or no chat template (or one that fails).
    """
    if chat:
        from atom_jax.chat import chat_text

        try:
            text = chat_text(tokenizer, [{"role": "user", "content": text}])
        except AtomError as error:
            raise AtomError(f"{error}; leave --chat out") from error
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that are no text, or half a surrogate pair in JSON
        raise AtomError(f"prompt {text!r} is not valid Unicode") from None
    # The template itself writes the special tokens. verbose=False: no warning for a prompt that is too long,
    # because there is an error for it later.
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    if not ids:
        raise AtomError(f"prompt {text!r} has no tokens")
    return ids


@dataclasses.dataclass(frozen=True)
class Generation:
    """A loaded model and the settings of its generation.

    Attributes:
      stop_ids: tokens that end a text, besides the model's own.
    """

    model: Model
    max_new_tokens: int
    sampling: SamplingParams
    seed: int = 0
    stop_ids: Sequence[int] = ()

    @property
    def stops(self) -> set[int]:
        """Every token that ends a text."""
        return {*self.model.config.eos_token_ids, *self.stop_ids}

    def stream(self, ids: list[int], *, echo: bool) -> tuple[list[int], dict[str, Any]]:
        """Continues one prompt; if ``echo``, writes the text to stdout as it is generated.

        Returns:
          The new tokens, and the timing.
        """
        from atom_jax.detokenize import StreamingDetokenizer
        from atom_jax.hosts import call_stream

        detokenizer = StreamingDetokenizer(self.model.tokenizer)
        tokens: list[int] = []
        times: list[float] = []
        started = time.perf_counter()
        for step, _ in call_stream(self.model, **self._request([ids])):
            tokens.append(int(step[0]))
            times.append(time.perf_counter() - started)
            if echo and tokens[-1] not in self.stops:
                sys.stdout.write(detokenizer.add(tokens[-1]))
                sys.stdout.flush()
        if echo:
            sys.stdout.write(detokenizer.finish() + "\n")
        # The first two tokens are left out: prefill and the decode step are compiled before them.
        steady = (len(times) - 2) / (times[-1] - times[1]) if len(times) > 2 else None
        timing = _timing([ids], [tokens], times[-1])
        return tokens, timing | {"seconds_to_first_token": times[0], "decode_tokens_per_second": steady}

    def batch(self, ids: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
        """Continues all prompts at once; returns the new tokens of each, and timing."""
        import numpy as np

        from atom_jax import generate
        from atom_jax.hosts import call

        started = time.perf_counter()
        out = call(generate, self.model, **self._request(ids))
        rows = zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
        tokens = [row[:length].tolist() for row, length in rows]
        return tokens, _timing(ids, tokens, time.perf_counter() - started)

    def result(self, prompt: str, ids: list[int], tokens: list[int]) -> dict[str, Any]:
        """A prompt and its continuation; a token that ended the text is in ``tokens``, not in ``text``."""
        from atom_jax.detokenize import detokenize

        stopped = tokens[-1] in self.stops
        return {
            "prompt": prompt,
            "text": detokenize(self.model.tokenizer, tokens[:-1] if stopped else tokens),
            "tokens": tokens,
            "prompt_tokens": len(ids),
            "finish_reason": "stop" if stopped else "length",
        }

    def _request(self, ids: list[list[int]]) -> dict[str, Any]:
        """The arguments of ``atom_jax.generate`` and ``stream``; prompts are padded on the right."""
        import jax
        import numpy as np

        longest = max(map(len, ids))
        return {
            "tokens": np.asarray([row + [0] * (longest - len(row)) for row in ids], np.int32),
            "lengths": np.asarray([len(row) for row in ids], np.int32),
            "max_new_tokens": self.max_new_tokens,
            "key": jax.random.key(self.seed),
            "sampling": self.sampling,
            "stop_ids": self.stop_ids,
        }


def _timing(ids: list[list[int]], tokens: list[list[int]], seconds: float) -> dict[str, Any]:
    new_tokens = sum(map(len, tokens))
    return {
        "prompt_tokens": sum(map(len, ids)),
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
    }


def describe_timing(timing: dict[str, Any]) -> str:
    """The timing as a line for humans."""
    line = f"{timing['new_tokens']} tokens in {timing['seconds']:.1f} s with compilation"
    if steady := timing.get("decode_tokens_per_second"):
        return f"{line}; {steady:.1f} tokens/s after it"
    return f"{line}: {timing['tokens_per_second']:.1f} tokens/s"
