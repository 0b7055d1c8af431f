"""Keys of projects. A secret is told once, and is in no log, error or trace."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from rollmesh import types
from rollmesh.errors import InvalidRequest, NotFound
from rollmesh.names import key_name, parse_key, parse_project

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.coordinator.store import KeyStore

_MAX_NOTE = 200
_SHOWN = 8
"""Characters of a secret that its key shows: "tml-" and 24 of its 256 random bits."""


class Keys:
    """The keys of all projects.

    Args:
        store: where they are, with the hashes of their secrets.
        max_keys: of one project.
        clock: Unix seconds.
        new_id: an id that no key had before.
        new_secret: a secret that nobody can guess.
    """

    def __init__(
        self,
        store: KeyStore,
        *,
        max_keys: int,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        new_secret: Callable[[], str],
    ) -> None:
        self._store = store
        self._max_keys = max_keys
        self._clock = clock
        self._new_id = new_id
        self._new_secret = new_secret

    async def create(self, parent: str, note: str) -> tuple[types.Key, str]:
        """A new key of a project, and its secret.

        Raises:
            InvalidRequest: parent or note.
            Overloaded: the project has as many as it may.
        """
        project = parse_project(parent)
        if len(note) > _MAX_NOTE or not note.isprintable():
            allowed = f"one line of at most {_MAX_NOTE} printable characters"
            raise InvalidRequest(
                f"note: {note!r} is not {allowed}", field="note", value=note, allowed=allowed
            )
        secret = self._new_secret()
        key = types.Key(
            key_name(project, self._new_id()),
            note,
            prefix=secret[:_SHOWN],
            create_time=self._clock(),
        )
        await self._store.create(key, _hash(secret), max_keys=self._max_keys)
        return key, secret

    async def of_project(self, parent: str) -> list[types.Key]:
        """Those of a project, the oldest first. InvalidRequest: parent."""
        return await self._store.of_project(parse_project(parent))

    async def delete(self, name: str) -> None:
        """Delete a key. InvalidRequest: the name; NotFound: there is none."""
        parse_key(name)
        await self._store.delete(name)

    async def find(self, secret: str) -> types.Key:
        """The key that a secret is of. NotFound, which does not repeat the secret: of none."""
        key = await self._store.find(_hash(secret))
        if key is None:
            raise NotFound("no key has this secret", resource="key")
        return key


def _hash(secret: str) -> str:
    # A secret has 256 random bits: a slow hash with salt would make none harder to guess.
    return hashlib.sha256(secret.encode()).hexdigest()
