"""``atom-jax serve``: OpenAI's API over HTTP."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from atom_jax.errors import AtomError, not_one_of
from atom_jax_cli.console import note
from atom_jax_cli.engine import (
    CheckpointArgument,
    DeterministicOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    MemoryOption,
    ModelNameOption,
    PageSizeOption,
    PrefixCachingOption,
    TokenBudgetOption,
    load_engine,
    served_name,
)

_LIMITS = "Limits"
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def serve(
    checkpoint: CheckpointArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    model_name: ModelNameOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Requests must bring it. Others on the machine can read a command line, not the variable.",
            envvar="ATOM_JAX_API_KEY",
            show_default="none is asked for",
        ),
    ] = None,
    memory_gb: MemoryOption = None,
    page_size: PageSizeOption = 64,
    max_num_seqs: MaxNumSeqsOption = 32,
    max_model_len: MaxModelLenOption = None,
    token_budget: TokenBudgetOption = 512,
    prefix_caching: PrefixCachingOption = True,
    deterministic: DeterministicOption = False,
    max_queue: Annotated[
        int, typer.Option(help="Answers that wait; more are refused (429).", min=0, rich_help_panel=_LIMITS)
    ] = 256,
    max_body_kb: Annotated[int, typer.Option(help="Largest request.", min=1, rich_help_panel=_LIMITS)] = 2048,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds after which an answer is given up.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that answers have to end after SIGTERM.", rich_help_panel=_LIMITS)
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
) -> None:
    """Serve CKPT with OpenAI's API, a page to try it, and metrics."""
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise AtomError(f"the server needs {module}: pip install 'atom-jax[serve]'")
    if log_level not in _LOG_LEVELS:
        raise not_one_of("log level", log_level, _LOG_LEVELS)

    from atom_jax.server.app import Service
    from atom_jax.server.config import ServerConfig
    from atom_jax.server.run import bind, url_of
    from atom_jax.server.run import serve as run

    # Errors in options and a used port are found here, because loading and compiling take minutes.
    config = ServerConfig(
        model_name=served_name(checkpoint, model_name),
        max_in_flight=max_num_seqs + max_queue,
        api_key=api_key,
        max_body_bytes=max_body_kb * 1024,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
    )
    with bind(host, port) as sock:
        model, engine = load_engine(
            checkpoint,
            memory_gb=memory_gb,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            token_budget=token_budget,
            prefix_caching=prefix_caching,
            deterministic=deterministic,
        )
        service = Service(config, engine, model.tokenizer)
        address = url_of(sock)
        run(service, sock, log_level=log_level, on_started=lambda: note(f"{config.model_name} at {address}"))
    if service.engine.failure is not None:
        raise typer.Exit(1)
