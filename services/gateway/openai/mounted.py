"""OpenAI's endpoints over the gateway's cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rollmesh.tokenizer import load_tokenizer
from services.gateway.auth import Unauthenticated
from services.gateway.openai.ports import key_of
from services.gateway.openai.routes import routes

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.routing import Route

    from rollmesh.client import Client
    from services.gateway.config import GatewayConfig
    from services.gateway.gateway import Gateway


def openai_routes(config: GatewayConfig, gateway: Gateway, client: Client) -> list[Route]:
    """Let in whom the gateway lets in, and know its checkpoints by their paths."""

    async def project_of(request: Request) -> str | None:
        try:
            return (await gateway.auth.caller(key_of(request))).project
        except Unauthenticated:
            return None

    return routes(
        config.openai,
        client,
        records=client.records,
        project_of=project_of,
        policy_of=gateway.named.policy,
        load_tokenizer=lambda base_model: load_tokenizer(config.tokenizer_of(base_model)),
    )
