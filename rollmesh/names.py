"""Resource names: `projects/{p}`, and what is under it.

`futures/{f}`, `jobs/{j}`, `keys/{k}`, `leases/{l}`, `sweeps/{s}`, `adapters/{a}`, and under that
`checkpoints/{c}`.

An id never holds a slash, a dot or an upper-case letter, so no name can climb out of a folder,
and two names never differ in case alone.
"""

from __future__ import annotations

import re

from rollmesh.errors import InvalidRequest

ID_PATTERN = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_ID = re.compile(ID_PATTERN)
_COLLECTIONS = ("adapters", "futures", "jobs", "keys", "leases", "sweeps")


def check_id(value: str, *, field: str) -> str:
    """`value`, which must be 1–63 of [a-z0-9-], start with a letter and not end with a hyphen."""
    if not _ID.fullmatch(value):
        raise InvalidRequest(
            f"{field}: {value!r} is not an id: 1–63 of a-z, 0-9 and '-', starting with a letter, "
            "not ending with '-'",
            field=field,
            value=value,
            allowed=ID_PATTERN,
        )
    return value


def project_name(project: str) -> str:
    """`projects/{project}`."""
    return f"projects/{project}"


def adapter_name(project: str, adapter: str) -> str:
    """`projects/{project}/adapters/{adapter}`."""
    return f"projects/{project}/adapters/{adapter}"


def future_name(project: str, future: str) -> str:
    """`projects/{project}/futures/{future}`."""
    return f"projects/{project}/futures/{future}"


def job_name(project: str, job: str) -> str:
    """`projects/{project}/jobs/{job}`."""
    return f"projects/{project}/jobs/{job}"


def key_name(project: str, key: str) -> str:
    """`projects/{project}/keys/{key}`."""
    return f"projects/{project}/keys/{key}"


def lease_name(project: str, lease: str) -> str:
    """`projects/{project}/leases/{lease}`."""
    return f"projects/{project}/leases/{lease}"


def sweep_name(project: str, sweep: str) -> str:
    """`projects/{project}/sweeps/{sweep}`."""
    return f"projects/{project}/sweeps/{sweep}"


def parse_project(name: str, *, field: str = "parent") -> str:
    """The project's id in `projects/{p}`."""
    prefix, slash, project = name.partition("/")
    if prefix != "projects" or not slash or not _ID.fullmatch(project):
        raise _malformed(name, field, "projects/{project}")
    return project


def parse_adapter(name: str, *, field: str = "name") -> tuple[str, str]:
    """Ids of project and adapter in `projects/{p}/adapters/{a}`."""
    return _parse(name, "adapters", field)


def checkpoint_name(adapter: str, checkpoint: str) -> str:
    """`{adapter}/checkpoints/{checkpoint}`, where `adapter` is a resource name."""
    return f"{adapter}/checkpoints/{checkpoint}"


def parse_checkpoint(name: str, *, field: str = "name") -> tuple[str, str, str]:
    """Ids of project, adapter and checkpoint in `projects/{p}/adapters/{a}/checkpoints/{c}`."""
    adapter, _, checkpoint = name.partition("/checkpoints/")
    ids = adapter.split("/")
    if (
        len(ids) == 4
        and ids[::2] == ["projects", "adapters"]
        and all(_ID.fullmatch(part) for part in (ids[1], ids[3], checkpoint))
    ):
        return ids[1], ids[3], checkpoint
    raise _malformed(name, field, "projects/{project}/adapters/{adapter}/checkpoints/{id}")


def parse_future(name: str, *, field: str = "name") -> tuple[str, str]:
    """Ids of project and future in `projects/{p}/futures/{f}`."""
    return _parse(name, "futures", field)


def parse_job(name: str, *, field: str = "name") -> tuple[str, str]:
    """Ids of project and job in `projects/{p}/jobs/{j}`."""
    return _parse(name, "jobs", field)


def parse_key(name: str, *, field: str = "name") -> tuple[str, str]:
    """Ids of project and key in `projects/{p}/keys/{k}`."""
    return _parse(name, "keys", field)


def parse_lease(name: str, *, field: str = "name") -> tuple[str, str]:
    """Ids of project and lease in `projects/{p}/leases/{l}`."""
    return _parse(name, "leases", field)


def parse_sweep(name: str, *, field: str = "name") -> tuple[str, str]:
    """Ids of project and sweep in `projects/{p}/sweeps/{s}`."""
    return _parse(name, "sweeps", field)


def _parse(name: str, collection: str, field: str) -> tuple[str, str]:
    assert collection in _COLLECTIONS  # noqa: S101 - our own mistake, not a caller's
    match name.split("/"):
        case ["projects", project, found, resource] if (
            found == collection and _ID.fullmatch(project) and _ID.fullmatch(resource)
        ):
            return project, resource
    raise _malformed(name, field, f"projects/{{project}}/{collection}/{{id}}")


def _malformed(name: str, field: str, form: str) -> InvalidRequest:
    return InvalidRequest(
        f"{field}: {name!r} is not a name of the form {form}; an id is 1–63 of a-z, 0-9 and '-', "
        "starting with a letter, not ending with '-'",
        field=field,
        value=name,
        allowed=form,
    )
