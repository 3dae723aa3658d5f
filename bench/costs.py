"""Bytes and operations of a case: those of the one op that it calls."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import calls
from pallas_kernels.dispatch import REFERENCE, record_choices, use_implementation
from pallas_kernels.roofline import Cost
from pallas_kernels.verification.cases import Case


def cost(case: Case) -> Cost:
    """The least that one call of ``case`` must move and multiply."""

    def call(*inputs: Any) -> Any:  # a new function each time: a cached trace records nothing
        return case.call(*inputs)

    with use_implementation(REFERENCE), record_choices() as choices:
        jax.eval_shape(call, *case.abstract_inputs)
    (choice,) = choices
    return calls.cost(choice)
