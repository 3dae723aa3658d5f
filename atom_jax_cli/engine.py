"""How ``serve`` and ``batch`` make the engine: their common options, its memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atom_jax_cli.console import format_bytes, note
from atom_jax_cli.kernels import check_kernels_for
from atom_jax_cli.model import load_model

if TYPE_CHECKING:
    from atom_jax.checkpoint import Model
    from atom_jax.engine import Engine, EngineConfig

_ENGINE = "Engine"

ModelNameOption = Annotated[
    str | None,
    typer.Option(help="What requests call the model.", show_default="the folder's name"),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        help="Of each device, for weights and cache together; what the weights leave becomes cache pages.",
        show_default="weights and 4 GiB, or less",
        rich_help_panel=_ENGINE,
    ),
]
PageSizeOption = Annotated[
    int, typer.Option(help="Tokens a cache page; GPU kernels want 64.", min=1, rich_help_panel=_ENGINE)
]
MaxNumSeqsOption = Annotated[
    int, typer.Option(help="Answers that run at once.", min=1, rich_help_panel=_ENGINE)
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of a prompt and its answer together.",
        min=2,
        show_default="the model's, at most 4096",
        rich_help_panel=_ENGINE,
    ),
]
TokenBudgetOption = Annotated[
    int, typer.Option(help="Most tokens that one step computes.", min=1, rich_help_panel=_ENGINE)
]
PrefixCachingOption = Annotated[
    bool,
    typer.Option(
        help="Keep the pages of ended answers for prompts that begin alike.", rich_help_panel=_ENGINE
    ),
]
GenerationConfigOption = Annotated[
    str,
    typer.Option(
        help="How tokens are drawn where a request leaves it open: auto, as the checkpoint says, or none, "
        "at temperature 1."
    ),
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        help="The same answer, bit for bit, whatever is served beside it; slower on a GPU.",
        rich_help_panel=_ENGINE,
    ),
]


def load_engine(
    checkpoint: Path, config: EngineConfig, *, memory_gb: float | None, tensor_parallel: int = 1
) -> tuple[Model, Engine]:
    """Loads a checkpoint and makes an engine for it. Its programs are not compiled yet.

    Args:
      checkpoint: folder.
      config: of the engine, without ``memory_bytes``.
      memory_gb: memory of each device for weights and cache together, in 10**9 bytes.
      tensor_parallel: number of devices among which the model is divided.

    Raises:
      AtomError: there is no checkpoint, it does not run on so many devices, or the sizes do not fit it or
        each other.
    """
    from atom_jax.checkpoint import abstract_params, default_dtype, read_config
    from atom_jax.compilation_cache import enable_compilation_cache
    from atom_jax.engine import Engine
    from atom_jax.engine.sizes import weight_bytes, within_memory
    from atom_jax.explain import step_choices
    from pallas_kernels.native.parallel import compiling_in_parallel

    enable_compilation_cache()
    check_kernels_for(checkpoint)
    with compiling_in_parallel():
        # The kernels of its programs are compiled while it is read. Any step will do: all call the same.
        shapes = read_config(checkpoint)
        params = abstract_params(shapes, default_dtype())
        step_choices(params, shapes, batch=1, seq=1, context=config.page_size)
        model = load_model(checkpoint, tensor_parallel, deterministic=config.deterministic)
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        # Imported while the engine's cache is filled with zeros. Without one it fails now, not at a request.
        tokenizer = pool.submit(lambda: model.tokenizer)
        engine = Engine(model, within_memory(model, config, memory_gb))
        tokenizer.result()
    stats = engine.stats()
    each = "" if tensor_parallel == 1 else f" on each of {tensor_parallel} devices"
    note(
        f"weights {format_bytes(weight_bytes(model))}{each}; {stats.num_pages} cache pages of "
        f"{config.page_size} tokens; up to {config.max_num_seqs} answers of {engine.max_model_len} tokens "
        "at once"
    )
    return model, engine


def uses_generation_config(option: str) -> bool:
    """What ``GenerationConfigOption`` means.

    Raises:
      AtomError: it is none of its values.
    """
    from atom_jax.errors import not_one_of

    if option not in ("auto", "none"):
        raise not_one_of("generation config", option, ("auto", "none"))
    return option == "auto"


def served_name(checkpoint: Path, model_name: str | None) -> str:
    """The name of the model in requests: the given one, or that of the folder."""
    return model_name or checkpoint.resolve().name
