"""How commands load a model: the checkpoint, and the devices among which it is divided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atom_jax_cli.console import stderr
from atom_jax_cli.kernels import check_kernels_for

if TYPE_CHECKING:
    from atom_jax.checkpoint import Model

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CKPT", help="Converted checkpoint.", show_default=False)
]
TensorParallelOption = Annotated[
    int,
    typer.Option(
        help="Devices among which the model is divided: a divisor of the checkpoint's shards "
        "(convert --shards).",
        min=1,
    ),
]


def load_model(checkpoint: Path, tensor_parallel: int = 1, *, deterministic: bool = False) -> Model:
    """Loads a checkpoint, after a check of the kernels if it is their first use on this device.

    Args:
      checkpoint: folder.
      tensor_parallel: number of devices; with more than one the model is divided among the first of them.
      deterministic: whether sums over devices must have a fixed order.

    Raises:
      AtomError: there is no checkpoint, it does not run on so many devices, or there are fewer.
    """
    from atom_jax import distributed, load
    from atom_jax.hosts import load_divided

    check_kernels_for(checkpoint)
    with stderr.status("Loading the checkpoint"):
        if tensor_parallel == 1 and not distributed.leads():
            return load(checkpoint)
        return load_divided(checkpoint, tensor_parallel, deterministic or None)
