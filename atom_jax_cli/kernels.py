"""The check of the GPU kernels, which commands make before they load a model."""

from __future__ import annotations

from pathlib import Path

from atom_jax_cli.console import note, progress_bars, stderr

STAGE = "kernel checks"


def check_kernels_for(*checkpoints: Path) -> None:
    """Checks the kernels of this device if they were not checked yet, and shows a progress bar.

    Raises:
      AtomError: one of ``checkpoints`` is not a checkpoint. This is found before the check, which takes long.
    """
    from atom_jax.checkpoint import read_config
    from atom_jax.kernel_check import check_kernels, check_pending

    if not check_pending():
        return
    for checkpoint in checkpoints:
        read_config(checkpoint)
    with progress_bars() as report:
        warning = check_kernels(announce=note, progress=lambda done, total: report(STAGE, done, total))
    if warning is not None:
        line = f"warning: {warning}"
        stderr.print(line, markup=False, highlight=False, soft_wrap=True, style="yellow")
