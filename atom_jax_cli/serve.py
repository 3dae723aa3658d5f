"""``atom-jax serve``: OpenAI's API over HTTP."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from atom_jax.errors import AtomError, not_one_of
from atom_jax_cli.console import note
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

_LIMITS = "Limits"
_KEYS_VARIABLE = "ATOM_JAX_API_KEY"
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def serve(
    checkpoint: CheckpointArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    model_name: ModelNameOption = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Requests must bring one of these keys. Others on the machine can read a command line, but "
            f"not a file or the variable {_KEYS_VARIABLE} (keys between commas).",
            show_default="none is asked for",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with such keys, one a line.", show_default="none")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Web sites whose pages may use the API, between commas: https://example.com, or *.",
            show_default="none",
        ),
    ] = None,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Host names that are answered, between commas: example.com, *.example.com.",
            show_default="all",
        ),
    ] = None,
    memory_gb: MemoryOption = None,
    page_size: PageSizeOption = 64,
    max_num_seqs: MaxNumSeqsOption = 32,
    max_model_len: MaxModelLenOption = None,
    token_budget: TokenBudgetOption = 512,
    prefix_caching: PrefixCachingOption = True,
    deterministic: DeterministicOption = False,
    tensor_parallel: TensorParallelOption = 1,
    generation_config: GenerationConfigOption = "auto",
    max_queue: Annotated[
        int, typer.Option(help="Answers that wait; more are refused (429).", min=0, rich_help_panel=_LIMITS)
    ] = 256,
    max_body_kb: Annotated[int, typer.Option(help="Largest request.", min=1, rich_help_panel=_LIMITS)] = 2048,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds after which an answer is given up.", rich_help_panel=_LIMITS)
    ] = 600.0,
    head_timeout: Annotated[
        float, typer.Option(help="Seconds for the head of a request to arrive.", rich_help_panel=_LIMITS)
    ] = 10.0,
    idle_timeout: Annotated[
        float,
        typer.Option(help="Seconds until a connection without a request is closed.", rich_help_panel=_LIMITS),
    ] = 30.0,
    max_connections: Annotated[
        int,
        typer.Option(help="Most connections, file descriptors permitting.", min=1, rich_help_panel=_LIMITS),
    ] = 1000,
    drain_delay: Annotated[
        float,
        typer.Option(
            help="Seconds after SIGTERM in which requests are still accepted while /health says draining.",
            rich_help_panel=_LIMITS,
        ),
    ] = 0.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that answers have to end after SIGTERM and that.", rich_help_panel=_LIMITS
        ),
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="critical, error, warning, info or debug.")] = "info",
) -> None:
    """Serve CKPT with OpenAI's API, a page to try it, and metrics."""
    began = time.perf_counter()

    def seconds() -> float:
        return time.perf_counter() - began

    for module in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise AtomError(f"the server needs {module}: pip install 'atom-jax[serve]'")
    if log_level not in _LOG_LEVELS:
        raise not_one_of("log level", log_level, _LOG_LEVELS)

    from atom_jax import distributed
    from atom_jax.engine import EngineConfig
    from atom_jax.openai.served_model import served_model
    from atom_jax.server.config import ServerConfig
    from atom_jax.server.run import bind, is_open, url_of
    from atom_jax.server.run import serve as run
    from atom_jax.server.service import Service

    with_defaults = uses_generation_config(generation_config)
    # Errors in options and a used port are found here, because loading and compiling take minutes.
    config = ServerConfig(
        model_name=served_name(checkpoint, model_name),
        max_in_flight=max_num_seqs + max_queue,
        api_keys=_keys(api_key, api_key_file),
        allowed_origins=_names(allowed_origins),
        allowed_hosts=_names(allowed_hosts),
        max_body_bytes=max_body_kb * 1024,
        max_connections=max_connections,
        head_timeout=head_timeout,
        idle_timeout=idle_timeout,
        request_timeout=request_timeout,
        drain_delay=drain_delay,
        drain_timeout=drain_timeout,
        page_size=page_size,
    )
    engine_config = EngineConfig(
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        token_budget=token_budget,
        prefix_caching=prefix_caching,
        deterministic=deterministic,
    )
    with bind(host, port) as sock:
        if not config.api_keys and is_open(sock):
            note(
                f"warning: whoever reaches {url_of(sock)} can use the model; "
                f"--api-key or {_KEYS_VARIABLE} asks for a key"
            )
        model, engine = load_engine(
            checkpoint, engine_config, memory_gb=memory_gb, tensor_parallel=tensor_parallel
        )
        service = Service(config, engine, served_model(model, engine, generation_config=with_defaults))
        address, programs = url_of(sock), service.engine.compilation.total
        service.on_ready = lambda: note(f"after {seconds():.1f} s {config.model_name} at {address}")
        service.on_compiled = lambda: note(f"after {seconds():.1f} s all {programs} programs are compiled")
        run(service, sock, log_level=log_level)
    status = 0 if service.engine.failure is None else 1
    if service.engine.compilation.running:
        distributed.end(failure="" if status == 0 else f"exit status {status}")
        # It cannot be interrupted. The end of the interpreter would end its thread in the middle of C++ code,
        # which aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        raise typer.Exit(status)


def _keys(given: Sequence[str] | None, file: Path | None) -> tuple[str, ...]:
    """The keys from the options, or else from the environment.

    Raises:
      AtomError: there is a file, but no key in it.
    """
    keys = list(given or ())
    if file is not None:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise AtomError(f"{file}: no key in it")
        keys += filter(None, lines)
    if given is None and file is None:
        keys = list(_names([os.environ.get(_KEYS_VARIABLE, "")]))
    return tuple(keys)


def _names(values: Sequence[str] | None) -> tuple[str, ...]:
    """The names between commas in all ``values``."""
    return tuple(name.strip() for value in values or () for name in value.split(",") if name.strip())
