"""The configuration of the server."""

from __future__ import annotations

import dataclasses
import math

from atom_jax.engine import EngineConfig
from atom_jax.errors import AtomError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Limits and names of the server.

    Attributes:
      model_name: the name of the model in requests.
      max_in_flight: the most answers that run or wait at the same time; further requests get status 429.
      api_keys: requests to the API must have the header ``Authorization: Bearer KEY`` with one of these keys,
        or get status 401. None at all: no key is needed.
      allowed_origins: web sites whose pages may use the API, e.g. ``https://example.com``; ``*`` is all.
      allowed_hosts: names in the header ``Host`` that are answered, e.g. ``example.com`` or
        ``*.example.com``. None at all: every name.
      max_body_bytes: the most bytes in the body of a request.
      max_connections: the most connections at the same time; fewer if the process may not open so many files.
      head_timeout: seconds in which the head of a request must arrive.
      read_timeout: seconds in which the body of a request must arrive, and in which a client must take some
        of its answer.
      idle_timeout: seconds after which a connection without a request is closed.
      request_timeout: seconds after which a request that is not answered is aborted.
      drain_delay: seconds after SIGTERM in which requests are still accepted, while ``/health`` tells load
        balancers to send no more.
      drain_timeout: seconds after that in which running answers may end.
      page_size: tokens in a page of the engine's cache, for ``/metrics``.
    """

    model_name: str
    max_in_flight: int = 288
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**21
    max_connections: int = 1000
    head_timeout: float = 10.0
    read_timeout: float = 30.0
    idle_timeout: float = 30.0
    request_timeout: float = 600.0
    drain_delay: float = 0.0
    drain_timeout: float = 30.0
    page_size: int = EngineConfig.page_size

    def __post_init__(self) -> None:
        for name in (
            "max_in_flight",
            "max_body_bytes",
            "max_connections",
            "head_timeout",
            "read_timeout",
            "idle_timeout",
            "request_timeout",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise AtomError(f"{name} must be positive, found {getattr(self, name)}")
        for name in ("drain_delay", "drain_timeout"):
            if not 0 <= getattr(self, name) < math.inf:
                raise AtomError(f"{name} must be 0 or more, found {getattr(self, name)}")
        if not all(key.strip() for key in self.api_keys):
            raise AtomError("the API key must not be empty")
        for host in self.allowed_hosts:
            if host != "*" and (not host or "*" in host.removeprefix("*.")):
                raise AtomError(f"allowed host {host!r}: a name, *.NAME or * expected")
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.count("/") != 2):
                raise AtomError(f"allowed origin {origin!r}: SCHEME://HOST without a path, or *, expected")
