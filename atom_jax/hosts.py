"""What a process that leads others has them do: load a checkpoint, run an engine, call a function.

Only the leader has the input and needs a tokenizer. The others get token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from atom_jax import distributed
from atom_jax.checkpoint import Model, load, read_config
from atom_jax.engine.device import (
    Compile,
    CompileUpdates,
    Device,
    MakeDevice,
    Rows,
    Run,
    ScorePrompt,
    SetLogitState,
    SetMasks,
)
from atom_jax.errors import AtomError, one_line
from atom_jax.generation import generate, stream
from atom_jax.perplexity import perplexity
from atom_jax.process_group import ProcessGroup
from atom_jax.progress import Progress
from atom_jax.sampling import LogitState, SamplingParams, SamplingRows
from atom_jax.scoring import score
from atom_jax.sharded import first_devices


class Load(NamedTuple):
    """Loads the checkpoint of the process, which must have the configuration of the leader's."""

    config: str
    devices: int
    fixed_order: bool | None


class Call(NamedTuple):
    """Calls a function on the parameters of the model; arguments as in ``call``."""

    function: str
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any]


class NextStep(NamedTuple):
    """Runs the next step of the ``stream`` that was called last."""


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (generate, perplexity, score, stream)
}
_TYPES = {
    each.__name__: each
    for each in (
        Call,
        Compile,
        CompileUpdates,
        Load,
        LogitState,
        MakeDevice,
        NextStep,
        Rows,
        Run,
        SamplingParams,
        SamplingRows,
        ScorePrompt,
        SetLogitState,
        SetMasks,
    )
}


def load_divided(path: Path, devices: int, fixed_order: bool | None) -> Model:
    """Loads a checkpoint in all processes of the group, divided among their devices.

    Args:
      path: folder of the checkpoint.
      devices: number of devices, in all processes together.
      fixed_order: as in ``load``.

    Raises:
      AtomError: as ``load``, or a process would have no part of the model.
    """
    found = jax.device_count()
    if distributed.leads() and devices != found:
        raise AtomError(
            f"--tensor-parallel {devices}: each process needs a part of the model, and the "
            f"{jax.process_count()} processes have {found} devices together; give {found}"
        )
    mesh = first_devices(devices)
    distributed.publish(Load(_config_text(path), devices, fixed_order))
    return load(path, mesh=mesh, fixed_order=fixed_order)


def _config_text(path: Path) -> str:
    return json.dumps(read_config(path).to_json(), sort_keys=True)


def call(
    function: Callable[..., Any],
    model: Model,
    *arguments: Any,
    progress: Progress | None = None,
    **settings: Any,
) -> Any:
    """``function(model.params, *arguments, config=model.config, **settings)``, in all processes of the group.

    Args:
      function: ``generate``, ``perplexity`` or ``score``.
      model: from ``load``.
      arguments, settings: of the function.
      progress: of the function, in this process only.
    """
    distributed.publish(Call(function.__name__, arguments, settings))
    reports = {} if progress is None else {"progress": progress}
    return function(model.params, *arguments, config=model.config, **settings, **reports)


def call_stream(model: Model, *arguments: Any, **settings: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``stream`` in all processes of the group; as ``call``."""
    steps = call(stream, model, *arguments, **settings)

    def run() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            distributed.publish(NextStep())
            try:
                yield next(steps)
            except StopIteration:
                return

    return run()


def follow(group: ProcessGroup, checkpoint: Path) -> None:
    """Does what the leader publishes, until it ends.

    Args:
      group: of this process.
      checkpoint: folder of the checkpoint on this host. It needs no tokenizer.

    Raises:
      AtomError: the checkpoint cannot be loaded, or it is not the leader's.
    """
    model: Model | None = None
    device: Device | None = None
    steps: Iterator[Any] = iter(())
    compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")
    results = ThreadPoolExecutor(1, thread_name_prefix="results")
    for operation in group.operations(_TYPES):
        match operation:
            case Load(config, devices, fixed_order):
                if _config_text(checkpoint) != config:
                    raise AtomError(f"{checkpoint}: its configuration is not that of process 0's checkpoint")
                model = load(checkpoint, mesh=first_devices(devices), fixed_order=fixed_order)
            case MakeDevice():
                assert model is not None
                device = Device(model, operation)
            case Call(function, arguments, settings):
                assert model is not None
                try:
                    steps = _FUNCTIONS[function](model.params, *arguments, config=model.config, **settings)
                except AtomError:
                    continue  # of the same arguments, which the leader reports
            case NextStep():
                next(steps, None)
            case Compile() | CompileUpdates():
                assert device is not None
                compiler.submit(device.start, operation)
            case _:
                assert device is not None
                results.submit(_wait_for, device.start(operation), group)
    compiler.shutdown(wait=False, cancel_futures=True)


def _wait_for(result: Any, group: ProcessGroup) -> None:
    """Waits for the result of an operation, which nobody else here reads, to see whether it has failed."""
    try:
        jax.block_until_ready(result)
    except Exception as error:
        group.await_news()
        group.abandon(one_line(error))
