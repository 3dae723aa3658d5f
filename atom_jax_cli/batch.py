"""``atom-jax batch``: answers to a file of requests in OpenAI's batch format."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from atom_jax.errors import AtomError
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
    from atom_jax.batch_files import BatchProgress, BatchRequest, BatchResult
    from atom_jax.engine import EngineConfig

_CLUSTER = "Cluster"


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
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Share the requests among replicas on a Ray cluster: host:port, auto for the one that this "
            "machine belongs to, local for this machine alone.",
            show_default="this process answers",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="Replicas of the model.",
            min=1,
            show_default="one for each GPU, or for each node without any",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Answer the requests in IN (OpenAI's batch format); an interrupted run goes on where it was."""
    from atom_jax.batch_files import check_requests, run_batch
    from atom_jax.engine import EngineConfig

    if replicas is not None and ray is None:
        raise AtomError("--replicas needs a Ray cluster: give --ray too, e.g. --ray local")
    with_defaults = uses_generation_config(generation_config)
    name = served_name(checkpoint, model_name)
    check_requests(requests, name)  # loading and compiling take minutes: find errors before
    config = EngineConfig(
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        token_budget=token_budget,
        prefix_caching=prefix_caching,
        deterministic=deterministic,
    )
    with contextlib.ExitStack() as stack:
        if ray is None:
            answer = _in_this_process(
                checkpoint, config, memory_gb, tensor_parallel, generation_config=with_defaults
            )
        else:
            from atom_jax.ray_batch import connected, ray_answers

            cluster = stack.enter_context(connected(ray, replicas, tensor_parallel))
            devices = "CPUs" if not cluster.gpus else f"GPUs: {cluster.gpus}"
            note(f"replicas: {cluster.count}, each with {devices}")
            answer = functools.partial(
                ray_answers,
                replicas=cluster,
                checkpoint=checkpoint,
                config=config,
                memory_gb=memory_gb,
                tensor_parallel=tensor_parallel,
                generation_config=with_defaults,
            )
        started = time.perf_counter()
        on_result = stack.enter_context(_bar())
        end = run_batch(answer, requests, results, model_name=name, on_result=on_result)
    seconds = time.perf_counter() - started
    rate = end.tokens / seconds
    if json_output:
        print_json({**dataclasses.asdict(end), "seconds": seconds, "tokens_per_second": rate})
    note(f"{end.done} results; {end.failed} errors and {end.tokens} tokens of this run")
    note(f"{seconds:.1f} s: {rate:.1f} tokens/s")


def _in_this_process(
    checkpoint: Path,
    config: EngineConfig,
    memory_gb: float | None,
    tensor_parallel: int,
    *,
    generation_config: bool,
) -> Callable[[Iterator[BatchRequest]], Iterator[BatchResult]]:
    """What ``run_batch`` calls to answer requests with an engine of this process."""
    from atom_jax.batch import engine_answers
    from atom_jax.openai.served_model import served_model

    model, engine = load_engine(checkpoint, config, memory_gb=memory_gb, tensor_parallel=tensor_parallel)
    with progress_bars() as report:
        engine.warm_up(lambda done, total: report("programs compiled", done, total))
    served = served_model(model, engine, generation_config=generation_config)
    return lambda requests: engine_answers(engine, served, requests, ahead=2 * config.max_num_seqs)


@contextlib.contextmanager
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
