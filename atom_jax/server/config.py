"""The configuration of the server."""

from __future__ import annotations

import dataclasses
import math

from atom_jax.errors import AtomError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Limits and names of the server.

    Attributes:
      model_name: the name of the model in requests.
      max_in_flight: the most answers that run or wait at the same time; further requests get status 429.
      api_key: requests to /v1 must have the header ``Authorization: Bearer KEY`` with this key, or get status
        401. None: no key is needed.
      max_body_bytes: the most bytes in the body of a request.
      read_timeout: seconds in which the body of a request must arrive.
      request_timeout: seconds after which a request that is not answered is aborted.
      drain_timeout: seconds in which running answers may end after SIGTERM.
    """

    model_name: str
    max_in_flight: int = 288
    api_key: str | None = None
    max_body_bytes: int = 2**21
    read_timeout: float = 30.0
    request_timeout: float = 600.0
    drain_timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_in_flight", "max_body_bytes", "read_timeout", "request_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise AtomError(f"{name} must be positive, found {getattr(self, name)}")
        if not 0 <= self.drain_timeout < math.inf:
            raise AtomError(f"drain_timeout must be 0 or more, found {self.drain_timeout}")
        if self.api_key == "":
            raise AtomError("the API key must not be empty")
