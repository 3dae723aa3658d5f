"""Which implementation each op of a model would run on a device, with its tiles and roofline time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from atom_jax.checkpoint import abstract_params, default_dtype
from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError, not_one_of
from atom_jax.llama import Params, merge
from pallas_kernels.devices import IMPLEMENTATIONS, NEED_VERDICT
from pallas_kernels.dispatch import AUTO, Choice, cost, describe, record_choices, use_implementation
from pallas_kernels.roofline import H200, seconds

Part = Literal["layer", "head"]


class Line(NamedTuple):
    """One op at one shape, in a layer or in the head.

    Attributes:
      part: where the op runs.
      op: name of the op.
      shape: its shapes, as text.
      count: number of calls in one layer, or in the head.
      implementation: name of the implementation that runs.
      reason: why the preferred implementation does not run, where it does not.
      configuration: the kernel's configuration, such as tile sizes; empty for the reference.
      bytes: bytes that one call reads and writes.
      roofline_seconds: the least time of one call on one H200 at its data-sheet rates.
    """

    part: Part
    op: str
    shape: str
    count: int
    implementation: str
    reason: str
    configuration: str
    bytes: int
    roofline_seconds: float


def step_choices(
    params: Params, config: ModelConfig, *, batch: int, seq: int, context: int
) -> list[tuple[Part, Choice]]:
    """What runs each op of a step: those of a layer once, as one program serves all layers, and of the head.

    Nothing is computed: the step is traced with shapes only.

    Args:
      params: parameters of the model, or their shapes.
      config, batch, seq, context: as in ``explain``.
    """
    cache = jax.eval_shape(lambda: merge(params, config).new_cache(batch, context))
    tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    choices: list[tuple[Part, Choice]] = []

    def step(params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        # What ``forward`` computes, without jit: a call that jit has already traced would record nothing.
        model = merge(params, config)
        with record_choices() as chosen:
            hidden, _ = model.hidden(tokens, positions, cache)
        choices.extend(("layer", choice) for choice in chosen)
        with record_choices() as chosen:
            logits = model.logits(hidden[:, -1:])
        choices.extend(("head", choice) for choice in chosen)
        return logits

    jax.eval_shape(step, params, tokens, tokens, cache)
    return choices


def explain(
    config: ModelConfig, *, batch: int, seq: int, context: int, implementation: str = AUTO
) -> list[Line]:
    """The ops of one layer, and those of the head, in a step of a model.

    Nothing is computed and no weights are needed: the step is traced with shapes only, and every op reports
    what it chose. Where layers have different sliding windows, the lines are for the layer that sees the
    largest part of the context. The head computes the logits of the last token of each sequence.

    Args:
      config: configuration of the model.
      batch: number of sequences.
      seq: number of tokens of each sequence that the step processes; 1 is a decode step.
      context: number of tokens of each sequence for which the cache has room.
      implementation: see ``pallas_kernels.use_implementation``; "mosaic_sm90" shows, on any device, what a
        Hopper GPU would run.

    Raises:
      AtomError: an op does not have that implementation, or the implementation does not support these shapes.
    """
    if implementation not in (AUTO, *IMPLEMENTATIONS):
        raise not_one_of("implementation", implementation, (AUTO, *IMPLEMENTATIONS))
    dtype = default_dtype() if implementation not in NEED_VERDICT else jnp.bfloat16
    params = abstract_params(config, dtype)
    try:
        with use_implementation(implementation):
            choices = step_choices(params, config, batch=batch, seq=seq, context=context)
    except NotImplementedError as error:
        raise AtomError(str(error)) from error
    lines: dict[Line, int] = {}
    for part, choice in choices:
        call = choice.call
        if "window" in call._fields:  # a traced array here, while its cost needs an integer
            call = call._replace(window=config.longest_window)
        work = cost(choice.op, call)
        line = Line(
            part=part,
            op=choice.op,
            shape=describe(choice.op, call),
            count=1,
            implementation=choice.implementation,
            reason=choice.reason,
            configuration="" if choice.config is None else str(choice.config),
            bytes=work.bytes,
            roofline_seconds=seconds(work, H200),
        )
        lines[line] = lines.get(line, 0) + 1
    return [line._replace(count=count) for line, count in lines.items()]
