"""The cores of the gateway, put together."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.gateway.account import Account
from services.gateway.answers import Answers
from services.gateway.auth import Auth
from services.gateway.capabilities import Capabilities
from services.gateway.checkpoints import Checkpoints
from services.gateway.copies import Copies
from services.gateway.documents import Documents
from services.gateway.downloads import Downloads
from services.gateway.futures import Results
from services.gateway.listings import Listings
from services.gateway.models import Models
from services.gateway.named import Named
from services.gateway.policies import Policies
from services.gateway.queues import Queues
from services.gateway.sampling import Sampling
from services.gateway.search import Search
from services.gateway.secrets import Signer
from services.gateway.sessions import Sessions
from services.gateway.training import Training

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from services.gateway.config import GatewayConfig
    from services.gateway.ports import Mesh


@dataclass(frozen=True, slots=True)
class Gateway:
    """All that its endpoints call."""

    config: GatewayConfig
    auth: Auth
    sessions: Sessions
    search: Search
    models: Models
    training: Training
    checkpoints: Checkpoints
    listings: Listings
    copies: Copies
    downloads: Downloads
    sampling: Sampling
    named: Named
    results: Results
    capabilities: Capabilities
    account: Account


def gateway(
    config: GatewayConfig,
    mesh: Mesh,
    ending: asyncio.Event,
    *,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    new_id: Callable[[], str] = lambda: secrets.token_hex(8),
) -> Gateway:
    """The cores over `mesh`. `ending`: set when nobody is to be held any longer."""
    documents = Documents(mesh.records, monotonic)
    signer = Signer(documents)
    policies = Policies(
        mesh,
        monotonic,
        new_id,
        lease_ttl_s=config.lease_ttl_s,
        idle_ttl_s=config.model_idle_ttl_s,
    )
    sessions = Sessions(config, documents, policies, clock, new_id)
    queues = Queues(mesh.futures, documents)
    checkpoints = Checkpoints(config, mesh, documents, queues, clock)
    capabilities = Capabilities(config, mesh.fleet, monotonic)
    sampling = Sampling(
        mesh.futures,
        documents,
        sessions,
        checkpoints,
        policies,
        capabilities,
        clock,
        monotonic,
        leases_per_session=config.leases_per_session,
    )
    listings = Listings(config, mesh, documents, checkpoints)
    return Gateway(
        config,
        Auth(mesh.keys, signer, clock, cache_s=config.key_cache_s, token_s=config.token_lifetime_s),
        sessions,
        Search(documents, clock),
        Models(config, documents, sessions, queues, checkpoints, clock),
        Training(config, queues, checkpoints),
        checkpoints,
        listings,
        Copies(mesh, documents, sessions, checkpoints, clock, new_id),
        Downloads(
            mesh.checkpoints,
            checkpoints,
            sessions,
            documents,
            signer,
            clock,
            lifetime_s=config.url_lifetime_s,
        ),
        sampling,
        Named(checkpoints, policies, monotonic, lease_ttl_s=config.lease_ttl_s),
        Results(
            mesh.futures,
            Answers(queues, checkpoints, sampling),
            clock,
            ending,
            max_hold_s=config.max_hold_s,
        ),
        capabilities,
        Account(documents, listings),
    )
