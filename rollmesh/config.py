"""One way to read YAML: closed, frozen, documented models, and errors that name the key.

Every service's configuration and every job file is read here. Environment variables never
configure anything but secrets.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import functools
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeGuard, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from rollmesh.errors import InvalidRequest, MeshError

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator, Sequence

    from pydantic_core import ErrorDetails


ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """Base of every config: immutable, closed, documented by the strings under its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, values: object) -> object:
        # YAML reads `yes` and `on` as booleans, and pydantic would take those for a 1. As text they
        # are refused under the name of their key.
        if not isinstance(values, dict):
            return values
        numeric = _numeric_keys(cls)
        return {
            key: str(value) if isinstance(value, bool) and key in numeric else value
            for key, value in values.items()
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """The configuration in the YAML file at `path`.

        Raises:
            InvalidRequest: unreadable, not YAML, or not this model; the message names each key.
        """
        return cls.parse(read_yaml(path), source=str(path))

    @classmethod
    def parse(cls, values: object, *, source: str) -> Self:
        """The configuration in `values`, as a YAML reader returns them.

        Raises:
            InvalidRequest: not this model; the message names each key and `source`.
        """
        if not isinstance(values, dict):
            raise InvalidRequest(
                f"{source}: expected keys and values, found {type(values).__name__}", field=""
            )
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(error, cls, source=source) from None


def _home(path: str) -> str:
    return str(Path(path).expanduser()) if path.startswith("~") else path


ModelPath = Annotated[str, AfterValidator(_home)]
"""A local folder, where ~ is the home folder, or a hub id."""


_HOST_PORT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")


def check_address(address: str) -> str:
    """`address`, which must be host:port, with IPv6 in brackets."""
    match = _HOST_PORT.fullmatch(address)
    if match is None or int(match[1]) > 65535:
        raise ValueError(f"{address[:100]!r} is not host:port, with a port of 0 to 65535")
    return address


def check_peer_address(address: str) -> str:
    """`address`, which must be host:port or dns:///host:port."""
    check_address(address.removeprefix("dns:///"))
    return address


Address = Annotated[str, AfterValidator(check_address)]
"""host:port to serve at."""
PeerAddress = Annotated[str, AfterValidator(check_peer_address)]
"""host:port of another process, or dns:///host:port."""


class TlsConfig(Config):
    """TLS towards a server. The files are PEM, and read when the program starts."""

    ca_file: Path | None = None
    """Certificates of which one has signed the server's. Absent: those that gRPC brings along."""
    certificate_file: Path | None = None
    """Certificate that we show the server, with what it needs to be believed. Needs key_file."""
    key_file: Path | None = None
    """Its private key."""
    server_name: str = ""
    """Name that the server's certificate is for. Empty: the host of its address."""

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together")
        return self


class BaseModelConfig(Config):
    """The frozen base model that a trainer or a sampler serves."""

    name: str = Field(min_length=1)
    """Name that the mesh knows the model by; jobs ask for it."""
    path: ModelPath = ""
    """Local folder, where ~ is the home folder, or hub id to load it from. Empty: the name."""

    @property
    def source(self) -> str:
        """What to load."""
        return self.path or self.name


def from_command_line(model: type[ConfigT], program: str) -> ConfigT:
    """The configuration in the file that `--config` names.

    A mistake in it is one line on standard error and ends the process with status 2.
    """
    parser = argparse.ArgumentParser(f"python -m {program}", description=model.__doc__)
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML; docs/configuration.md lists the keys"
    )
    try:
        return model.load(parser.parse_args().config)
    except InvalidRequest as error:
        parser.exit(2, f"{error}\n")


def run(service: Coroutine[Any, Any, None]) -> None:
    """Run `service` to its end.

    An expected failure is one line on standard error and ends the process, with status 2 where
    the configuration is wrong, else with 1.
    """
    problem: BaseException | None = None
    try:
        asyncio.run(service)
    except* MeshError as failed:
        problem = failed
    while isinstance(problem, BaseExceptionGroup):
        problem = problem.exceptions[0]
    if problem is not None:
        print(problem, file=sys.stderr)  # noqa: T201 - a person reads why it does not serve
        sys.exit(2 if isinstance(problem, InvalidRequest) else 1)


def read_yaml(path: Path) -> object:
    """What the YAML file at `path` holds; an empty file is an empty mapping.

    Raises:
        InvalidRequest: unreadable or not YAML, with line and column.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", field=str(path)) from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: not UTF-8: {error}", field=str(path)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InvalidRequest(f"{path}{where}: not YAML: {problem}", field=str(path)) from None
    return {} if values is None else values


def explain(error: ValidationError, model: type[BaseModel], *, source: str) -> InvalidRequest:
    """`error` as one that names each key, what was found there, and for a typo the nearest key."""
    details = error.errors(include_url=False)
    problems = [_problem(detail, model) for detail in details]
    return InvalidRequest(
        f"{source}: " + "; ".join(problems),
        field=_path(details[0]["loc"]),
        value=str(details[0]["input"])[:200],
    )


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location = detail["loc"]
    path = _path(location)
    if detail["type"] == "extra_forbidden":
        known = _keys_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{path}: required, but absent"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message}, found {str(detail['input'])[:100]!r}"


def _path(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _keys_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys that `model` knows at `location`."""
    current: type[BaseModel] = model
    for part in location:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        inner = next(filter(_is_model, _types_in(field.annotation)), None) if field else None
        if inner is None:
            return []
        current = inner
    return [field.alias or name for name, field in current.model_fields.items()]


@functools.cache
def _numeric_keys(model: type[BaseModel]) -> frozenset[str]:
    """Cached: a dataset of 100,000 tasks is as many models."""
    return frozenset(
        key
        for key, field in model.model_fields.items()
        if not {int, float}.isdisjoint(_types_in(field.annotation))
    )


def _is_model(found: type) -> TypeGuard[type[BaseModel]]:
    return issubclass(found, BaseModel)


def _types_in(annotation: object) -> Iterator[type]:
    """The classes that `annotation` is made of."""
    if inspect.isclass(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _types_in(argument)
