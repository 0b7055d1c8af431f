"""Large bodies by key, in a folder or an object store: whatever fsspec has a driver for.

A blob is whole or not there at all, durable once `write` returns, and never changed after that.
Keys are made by the mesh itself and hold no dots, so that none can climb out of the store.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from typing import TYPE_CHECKING, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from rollmesh.errors import InvalidRequest, NotFound, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

_KEY = re.compile(r"[a-z0-9]+(?:/[a-z0-9_-]+)+")
_ATTEMPTS = 100


class Blobs:
    """The store at `url`: a folder, or a URL that fsspec understands, such as s3://bucket/prefix.

    Every method blocks: call it in a thread. Unavailable: the store does not answer or is full.

    Raises:
        InvalidRequest: no driver for the URL is installed.
    """

    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise InvalidRequest(f"blobs: {url!r}: {error}", field="blobs", value=url) from error

    def write(self, key: str, *parts: bytes) -> None:
        """Store `parts`, one after the other, under a new key."""
        path = self._path(key)
        try:
            if isinstance(self._files, LocalFileSystem):
                _write_file(path, key.count("/") + 1, parts)
            else:
                self._files.pipe_file(path, b"".join(parts))  # an object appears as a whole
        except OSError as error:
            raise _unavailable(error) from error

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """What was written under `key`, or those of its bytes from `start` to `end`.

        Raises:
            NotFound: nothing was, or it is deleted.
        """
        try:
            content: bytes = self._files.cat_file(self._path(key), start, end)
        except FileNotFoundError:
            raise NotFound(f"there is no blob {key}", resource=key) from None
        except OSError as error:
            raise _unavailable(error) from error
        return content

    def delete(self, key: str) -> None:
        """Let go of a blob; one that is not there is fine."""
        path = self._path(key)
        try:
            self._files.rm_file(path)
            if isinstance(self._files, LocalFileSystem):
                # The folder too where that was its last blob.
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.dirname(path))  # noqa: PTH106, PTH120
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unavailable(error) from error

    def keys(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Every key that begins with `prefix` and a slash, with its Unix time of writing."""
        folder = self._path(prefix + "/x").rpartition("/")[0]
        try:
            self._files.invalidate_cache()
            found = self._files.find(folder, detail=True)
        except OSError as error:
            raise _unavailable(error) from error
        for path, info in found.items():
            key = path[len(self._root) :].strip("/")
            if _KEY.fullmatch(key):
                yield key, _time_of(info)

    def _path(self, key: str) -> str:
        if not _KEY.fullmatch(key):
            raise InvalidRequest(f"key: {key!r} is not a key of a blob", field="key", value=key)
        return f"{self._root}/{key}"


def _write_file(path: str, depth: int, parts: tuple[bytes, ...]) -> None:
    """Under another name first, flushed to the disk, then renamed, and the name flushed too."""
    # A key of its own: what a killed process leaves is found by `keys`, and nothing refers to it.
    unfinished = f"{path}-unfinished-{os.getpid()}-{threading.get_ident()}"
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_new_file(unfinished))
        stack.callback(_remove, unfinished)
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        os.replace(unfinished, path)  # noqa: PTH105
    # A folder's own name is in its parent, and it may be new too: up to the store's own folder.
    folder = path
    for _ in range(depth):
        folder = os.path.dirname(folder)  # noqa: PTH120 - fsspec hands out strings
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _new_file(path: str) -> BinaryIO:
    folder = os.path.dirname(path)  # noqa: PTH120
    # Whoever deletes the last blob of a folder removes it, at any moment; seldom twice in a row.
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            return open(path, "wb")  # noqa: PTH123 - the caller closes it
    raise OSError(f"{folder} cannot be made")


def _remove(path: str) -> None:
    """Nothing is left of a blob that could not be written."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


def _time_of(info: dict[str, object]) -> float:
    """When a file or an object was written; 0 where its driver does not say."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, int | float):
            return float(value)
        if value is not None and hasattr(value, "timestamp"):
            return float(value.timestamp())
    return 0.0


def _unavailable(error: OSError) -> Unavailable:
    return Unavailable(f"the blob store does not answer: {error}")
