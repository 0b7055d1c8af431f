"""Configuration of an environment that the reward service routes to."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollmesh.config import Config, PeerAddress, TlsConfig
from rollmesh.names import ID_PATTERN

Seconds = Annotated[PositiveFloat, Field(le=86400)]


class BreakerConfig(Config):
    """A replica that fails one call after another is left alone for a while."""

    failures: PositiveInt = 5
    """Calls that failed there in a row, none having gone well in between, after which it is."""
    open_s: Seconds = 5.0
    """Seconds until one call tries it again."""


class EnvironmentConfig(Config):
    """An environment that somebody serves: rollmesh.api.environment.v1.EnvironmentService."""

    name: str = Field(pattern=rf"^{ID_PATTERN}$")
    """Name that jobs call it by."""
    addresses: list[PeerAddress] = Field(min_length=1)
    """Its replicas, host:port. Behind a name there may be several: each of its IP addresses is one,
    those of IPv4 where it has both kinds. They are looked up again every few seconds."""
    remote_name: str = ""
    """Name that the server itself calls it by. Empty: the same."""
    tls: TlsConfig | None = None
    """Absent: plaintext."""
    max_concurrent: PositiveInt = 4096
    """Episodes and Score calls at once at each replica; episodes at most as many as Describe says.
    No more than a connection may have streams, where the server or a proxy before it bounds them
    (Kestrel 100, nginx 128): what is beyond waits where nobody sees it."""
    max_waiting: NonNegativeInt = 16384
    """Calls that wait here for room there; one more is refused with OVERLOADED."""
    start_timeout_s: Seconds = 60.0
    """Seconds in which an episode has to begin, once there is room for it."""
    answer_timeout_s: Seconds = 60.0
    """Seconds in which an action has to be answered, or a call of Score, which has no more items
    than Describe says."""
    attempts: PositiveInt = 3
    """How often a call is tried in all, on other replicas where there are, when one says
    UNAVAILABLE. An episode is tried again only before its first observation."""
    patience_s: Seconds = 5.0
    """Seconds until a replica that does not answer is given up, with all that runs there, and for
    which calls wait when no replica takes work or all say RESOURCE_EXHAUSTED."""
    breaker: BreakerConfig = BreakerConfig()
    """When a replica that answers is left alone nevertheless."""

    @model_validator(mode="after")
    def _addresses_once(self) -> Self:
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError("addresses: one is there twice")
        return self

    @property
    def called(self) -> str:
        """The name that the server calls it by."""
        return self.remote_name or self.name
