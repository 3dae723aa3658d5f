"""How the server is set up."""

from __future__ import annotations

import dataclasses
import math

from atom_jax.errors import AtomError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Limits and names of the server.

    Attributes:
      model_name: what requests call the model.
      max_in_flight: answers that run or wait at once; requests beyond are refused with 429.
      api_key: without it in the header ``Authorization: Bearer KEY``, /v1 answers 401. None: open to all.
      max_body_bytes: of a request.
      read_timeout: seconds in which the body of a request must arrive.
      request_timeout: seconds after which an answer is given up.
      drain_timeout: seconds that running answers have to end after SIGTERM.
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
