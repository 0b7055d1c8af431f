"""Who a request is from: an API key, or the token that the SDK was given in exchange for one."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from cachetools import TLRUCache

from rollmesh.errors import InvalidRequest, MeshError, NotFound
from services.gateway.callers import Caller
from services.gateway.secrets import claims_of, to_base64

if TYPE_CHECKING:
    from collections.abc import Callable

    from rollmesh import types
    from services.gateway.ports import Keys
    from services.gateway.secrets import Signer

_SECRET = re.compile(r"tml-[A-Za-z0-9_-]{1,200}")
_TOKEN = re.compile(r"(eyJ[\w-]{1,200}\.[\w-]{1,2000})\.([\w-]{1,100})")
_CACHED = 10_000
_HEADER = to_base64(b'{"alg":"HS256","typ":"JWT"}')


class Unauthenticated(MeshError):
    """No key, or one that is nobody's. `stale`: it was good once, and another can be had."""

    status, reason = "UNAUTHENTICATED", "UNAUTHENTICATED"
    stale = False


class Stale(Unauthenticated):
    """A token that has expired."""

    stale = True


class Auth:
    """Finds callers. `clock`: Unix seconds. A key is believed for `cache_s` without asking."""

    def __init__(
        self,
        keys: Keys,
        signer: Signer,
        clock: Callable[[], float],
        *,
        cache_s: float,
        token_s: float,
    ) -> None:
        self._keys = keys
        self._signer = signer
        self._clock = clock
        self._cache_s = cache_s
        self._token_s = token_s
        # By what was shown, hashed: until when it is believed, and who that is.
        self._known: TLRUCache[bytes, tuple[float, Caller]] = TLRUCache(
            _CACHED, lambda _shown, known, _now: known[0], timer=clock
        )

    async def caller(self, shown: str) -> Caller:
        """Whoever shows `shown`.

        Raises:
            Unauthenticated: nobody.
        """
        hashed = hashlib.sha256(shown.encode()).digest()
        known = self._known.get(hashed)
        if known is None:
            known = self._known[hashed] = await self._ask(shown)
        return known[1]

    async def token(self, caller: Caller) -> str:
        """A token of the caller's, a JWT."""
        now = int(self._clock())
        claims = {
            "iss": "rollmesh",
            "sub": f"rollmesh:{caller.key}",
            "org_id": caller.project_id,
            "email": "",
            "key": caller.key,
            "iat": now,
            "exp": now + int(self._token_s),
        }
        payload = to_base64(json.dumps(claims, separators=(",", ":")).encode())
        signed = f"{_HEADER}.{payload}"
        return f"{signed}.{await self._signer.sign(caller.project, signed)}"

    async def forget(self, caller: Caller) -> None:
        """Delete the caller's key; nobody is let in by it from now on."""
        await self._keys.delete(caller.key)
        for hashed, (_, known) in list(self._known.items()):
            if known.key == caller.key:
                del self._known[hashed]

    async def _ask(self, shown: str) -> tuple[float, Caller]:
        until = self._clock() + self._cache_s
        if _SECRET.fullmatch(shown):
            try:
                return until, _caller(await self._keys.find(shown))
            except (NotFound, InvalidRequest):
                raise Unauthenticated("this API key is not known") from None
        if match := _TOKEN.fullmatch(shown):
            claims = claims_of(match[1].partition(".")[2]) or {}
            project, key, expires = _token_claims(claims)
            if await self._signer.holds(project, match[1], match[2]):
                if expires <= self._clock():
                    raise Stale("this token has expired")
                known = [each for each in await self._keys.list(project) if each.name == key]
                if known:
                    return min(until, expires), _caller(known[0])
        raise Unauthenticated("X-API-Key: an API key is needed, tml-…")


def _token_claims(claims: dict[str, Any]) -> tuple[str, str, float]:
    organization, key, expires = (claims.get(name) for name in ("org_id", "key", "exp"))
    if (
        not isinstance(organization, str)
        or not isinstance(key, str)
        or not isinstance(expires, int)
    ):
        raise Unauthenticated("this is no token of this mesh")
    return f"projects/{organization}", key, expires


def _caller(key: types.Key) -> Caller:
    return Caller(key.name.partition("/keys/")[0], key.name, key.note, key.prefix)
