"""What gateways sign with: one secret for each project, made by whichever needs it first."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
from typing import TYPE_CHECKING, Any

from rollmesh.errors import MeshError, NotFound
from rollmesh.names import parse_project

if TYPE_CHECKING:
    from services.gateway.documents import Documents

_KEY = "gateway/secret"


class Signer:
    """Signs and reads JSON claims; what a project's secret has signed names the project."""

    def __init__(self, documents: Documents) -> None:
        self._documents = documents

    async def sign(self, project: str, text: str) -> str:
        """Signature of `text` by the project's secret, URL-safe."""
        try:
            document = await self._documents.seen(project, _KEY)
        except NotFound:
            fresh = {"secret": secrets.token_hex(32)}
            document, _ = await self._documents.create(project, _KEY, fresh)
        return _signature(document.fields["secret"], text)

    async def holds(self, project: str, text: str, signature: str) -> bool:
        """Whether `signature` is that; nothing is made for whoever names a project."""
        try:
            parse_project(project)
            document = await self._documents.seen(project, _KEY)
        except NotFound:
            return False
        except MeshError as error:
            if error.status == "INVALID_ARGUMENT":
                return False
            raise
        expected = _signature(document.fields["secret"], text)
        return hmac.compare_digest(expected.encode(), signature.encode())


def _signature(secret: str, text: str) -> str:
    return to_base64(hmac.digest(bytes.fromhex(secret), text.encode(), hashlib.sha256))


def to_base64(data: bytes) -> str:
    """URL-safe and without padding."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def claims_of(text: str) -> dict[str, Any] | None:
    """The JSON object in base64 that `text` is; None: it is none."""
    try:
        claims = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return None
    return claims if isinstance(claims, dict) else None
