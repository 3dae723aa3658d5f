"""``atom-jax batch``: answers to a file of requests in OpenAI's batch format."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atom_jax_cli.console import LOG_SECONDS, JsonOption, note, print_json, progress_bars, stderr
from atom_jax_cli.engine import (
    DeterministicOption,
    GenerationConfigOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    MemoryOption,
    ModelNameOption,
    PageSizeOption,
    PrefixCachingOption,
    TokenBudgetOption,
    load_engine,
    served_name,
    uses_generation_config,
)
from atom_jax_cli.model import CheckpointArgument, TensorParallelOption

if TYPE_CHECKING:
    from atom_jax.batch import BatchProgress


def batch(
    checkpoint: CheckpointArgument,
    requests: Annotated[
        Path, typer.Argument(metavar="IN", help="Requests, a JSON object a line.", show_default=False)
    ],
    results: Annotated[
        Path, typer.Argument(metavar="OUT", help="Results; continued if it is there.", show_default=False)
    ],
    model_name: ModelNameOption = None,
    memory_gb: MemoryOption = None,
    page_size: PageSizeOption = 64,
    max_num_seqs: MaxNumSeqsOption = 32,
    max_model_len: MaxModelLenOption = None,
    token_budget: TokenBudgetOption = 512,
    prefix_caching: PrefixCachingOption = True,
    deterministic: DeterministicOption = False,
    tensor_parallel: TensorParallelOption = 1,
    generation_config: GenerationConfigOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Answer the requests in IN (OpenAI's batch format); an interrupted run goes on where it was."""
    from atom_jax.batch import check_requests, run_batch
    from atom_jax.openai.served_model import served_model

    with_defaults = uses_generation_config(generation_config)
    name = served_name(checkpoint, model_name)
    check_requests(requests, name)  # loading and compiling take minutes: find errors before
    model, engine = load_engine(
        checkpoint,
        memory_gb=memory_gb,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        token_budget=token_budget,
        prefix_caching=prefix_caching,
        deterministic=deterministic,
        tensor_parallel=tensor_parallel,
    )
    with progress_bars() as report:
        engine.warm_up(lambda done, total: report("programs compiled", done, total))
    started = time.perf_counter()
    with _bar() as on_result:
        end = run_batch(
            engine,
            served_model(model, engine, generation_config=with_defaults),
            requests,
            results,
            model_name=name,
            ahead=2 * max_num_seqs,
            on_result=on_result,
        )
    seconds = time.perf_counter() - started
    rate = end.tokens / seconds
    if json_output:
        print_json({**dataclasses.asdict(end), "seconds": seconds, "tokens_per_second": rate})
    note(f"{end.done} results; {end.failed} errors and {end.tokens} tokens of this run")
    note(f"{seconds:.1f} s: {rate:.1f} tokens/s")


@contextmanager
def _bar() -> Iterator[Callable[[BatchProgress], None]]:
    """Shows results done and tokens per second on stderr while the block runs.

    On a terminal it is a bar. Elsewhere, e.g. in a log, it is a line every ``LOG_SECONDS``.

    Yields:
      What ``run_batch`` calls after every result.
    """
    columns = (
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    live = stderr.is_terminal
    with Progress(*columns, console=stderr, disable=not live) as progress:
        task = progress.add_task("", rate=0.0)
        started = last_line = progress.get_time()

        def on_result(now: BatchProgress) -> None:
            nonlocal last_line
            moment = progress.get_time()
            rate = now.tokens / (moment - started)
            progress.update(task, completed=now.done, total=now.total, rate=rate)
            if not live and moment - last_line >= LOG_SECONDS:
                note(f"requests: {now.done} of {now.total}, {rate:.0f} tokens/s")
                last_line = moment

        yield on_result
