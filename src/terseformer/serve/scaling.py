"""How many replicas of a server there are on Ray, and where."""

from __future__ import annotations

import os
from dataclasses import dataclass

from terseformer.config import ConfigError

LOCAL = "local"
"""The address of a cluster that is begun for one server."""
_OWN_CLUSTER = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: it listens at 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not 15: somebody waits for what a replica writes
}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How many replicas of a server there are on Ray, and where; of use with --ray alone."""

    replicas: int = 2
    """Processes that serve the models on Ray; with --max-replicas, the fewest."""
    max_replicas: int = 0
    """As many as there may be, where requests need them; 0: --replicas, always."""
    target_requests: int = 0
    """Requests that a replica may have at a time before there should be another; 0: --max-batch."""
    ray_address: str = ""
    """The cluster to join, HOST:PORT or auto; without it RAY_ADDRESS, and else one of this machine alone is begun."""

    def __post_init__(self) -> None:
        for name, valid, allowed in (
            ("replicas", self.replicas >= 1, "at least 1"),
            ("max_replicas", self.max_replicas == 0 or self.max_replicas >= self.replicas, "0 or at least --replicas"),
            ("target_requests", self.target_requests >= 0, "at least 0"),
        ):
            if not valid:
                raise ConfigError(f"{name} must be {allowed}, not {getattr(self, name)!r}")
        if "://" in self.ray_address:
            raise ConfigError(
                f"ray_address must be HOST:PORT or auto, not {self.ray_address!r}; run the server on a machine of the "
                "cluster"
            )

    @property
    def most(self) -> int:
        """Replicas at most."""
        return self.max_replicas or self.replicas

    @property
    def address(self) -> str:
        """Of the cluster."""
        return self.ray_address or os.environ.get("RAY_ADDRESS", "") or LOCAL

    def prepare(self) -> None:
        """Sets what Ray reads from the environment as it is imported, unless the user has set it."""
        if self.address == LOCAL:
            for name, value in _OWN_CLUSTER.items():
                os.environ.setdefault(name, value)
