"""Configuration: read once, closed, and wrong in a way that says where and what instead."""

from __future__ import annotations

import pytest
from pydantic import PositiveFloat, PositiveInt, ValidationError

from rollmesh.config import Address, Config, PeerAddress, read_yaml, run
from rollmesh.errors import InvalidRequest, Unavailable


class Store(Config):
    """Where things are kept."""

    url: str
    """Where."""
    pool_size: PositiveInt = 4
    """How many."""


class Peer(Config):
    """Another process."""

    address: str
    """host:port."""
    weight: PositiveFloat = 1.0
    """How much of it."""


class Service(Config):
    """A service."""

    listen: str = "127.0.0.1:0"
    """Where."""
    store: Store = Store(url="sqlite://")
    """Its store."""
    peers: list[Peer] = []
    """Its peers."""
    backup: Store | None = None
    """A second store."""
    verbose: bool = False
    """Whether it talks."""
    limits: dict[str, int] = {}
    """By name."""


@pytest.fixture
def load(tmp_path):
    def load(text: str) -> Service:
        path = tmp_path / "service.yaml"
        path.write_text(text)
        return Service.load(path)

    return load


def test_what_a_file_says_is_read_and_the_rest_has_defaults(load):
    config = load("store: {url: x}\npeers:\n  - address: a:1\n    weight: 2\nverbose: yes\n")
    assert config == Service(
        store=Store(url="x"), peers=[Peer(address="a:1", weight=2.0)], verbose=True
    )


def test_an_empty_file_is_every_default(load):
    assert load("") == Service()
    assert load("# nothing yet\n") == Service()


def test_a_configuration_never_changes(load):
    with pytest.raises(ValidationError, match="frozen"):
        load("").listen = "0.0.0.0:80"


@pytest.mark.parametrize(
    ("text", "says", "field"),
    [
        pytest.param("lisen: x", "lisen: unknown key; did you mean 'listen'?", "lisen", id="top"),
        pytest.param(
            "store: {url: x, poolsize: 1}",
            "store.poolsize: unknown key; did you mean 'pool_size'?",
            "store.poolsize",
            id="nested",
        ),
        pytest.param(
            "peers: [{address: x}, {address: x, wieght: 1}]",
            "peers[1].wieght: unknown key; did you mean 'weight'?",
            "peers[1].wieght",
            id="in a list",
        ),
        pytest.param(
            "backup: {url: x, poolsize: 1}",
            "backup.poolsize: unknown key; did you mean 'pool_size'?",
            "backup.poolsize",
            id="behind an optional",
        ),
        pytest.param(
            "store: {url: x, colour: red}",
            "store.colour: unknown key; known keys: url, pool_size",
            "store.colour",
            id="like none",
        ),
        pytest.param("store: {}", "store.url: required, but absent", "store.url", id="missing"),
        pytest.param(
            "store: {url: x, pool_size: many}",
            "store.pool_size: Input should be a valid integer",
            "store.pool_size",
            id="text for a number",
        ),
        pytest.param("store: {url: 5}", "store.url: Input should be a valid string", "store.url",
                     id="number for text"),
        pytest.param(
            "store: {url: x, pool_size: 0}", "greater than 0, found '0'", "store.pool_size",
            id="out of range",
        ),
        pytest.param(
            "store: {url: x, pool_size: 1.5}", "store.pool_size: Input should be a valid integer",
            "store.pool_size", id="fraction for a whole number",
        ),
        pytest.param(
            "store: {url: x, pool_size: yes}", "store.pool_size: Input should be a valid integer",
            "store.pool_size", id="boolean for a whole number",
        ),
        pytest.param(
            "peers: [{address: x, weight: on}]", "peers[0].weight: Input should be a valid number",
            "peers[0].weight", id="boolean for a number",
        ),
        pytest.param("store: [1]", "store: Input should be a valid dictionary", "store",
                     id="list for a mapping"),
        pytest.param("peers: {}", "peers: Input should be a valid list", "peers",
                     id="mapping for a list"),
        pytest.param("limits: {a: x}", "limits.a: Input should be a valid integer", "limits.a",
                     id="value in a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_file_and_key(load, tmp_path, text, says, field):
    with pytest.raises(InvalidRequest) as caught:
        load(text)
    assert str(caught.value).startswith(f"{tmp_path / 'service.yaml'}: ")
    assert says in str(caught.value)
    assert caught.value.context["field"] == field


def test_all_mistakes_are_told_at_once(load):
    with pytest.raises(InvalidRequest, match=r"lisen.*; verbos: ") as caught:
        load("lisen: x\nverbos: 1\n")
    assert caught.value.context["field"] == "lisen"


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        pytest.param("a: 1\nb: [1, 2\n", ":3:1", "not YAML: expected ',' or ']'", id="unclosed"),
        pytest.param("a: 1\n\tb: 2\n", ":2:1", "not YAML", id="tab"),
        pytest.param("a: b: c\n", ":1:5", "not YAML: mapping values", id="two colons"),
    ],
)
def test_malformed_yaml_is_named_by_line_and_column(load, tmp_path, text, where, says):
    with pytest.raises(InvalidRequest) as caught:
        load(text)
    assert str(caught.value).startswith(f"{tmp_path / 'service.yaml'}{where}: {says}")


@pytest.mark.parametrize(("text", "found"), [("- a", "list"), ("5", "int"), ("text", "str")])
def test_a_file_that_holds_no_keys_is_refused(load, text, found):
    with pytest.raises(InvalidRequest, match=f"expected keys and values, found {found}"):
        load(text)


def test_an_unreadable_file_is_refused_by_its_name(tmp_path):
    absent, folder, binary = tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, says in ((absent, "No such file"), (folder, "Is a directory"), (binary, "not UTF-8")):
        with pytest.raises(InvalidRequest, match=says) as caught:
            read_yaml(path)
        assert str(path) in str(caught.value)


def test_yaml_makes_no_objects(load):
    with pytest.raises(InvalidRequest, match="not YAML: could not determine a constructor"):
        load("listen: !!python/object/apply:os.getcwd []")


# --- addresses -----------------------------------------------------------------------------------


class Addressed(Config):
    """A service with a peer."""

    listen: Address = "127.0.0.1:0"
    """Where."""
    peers: list[PeerAddress] = []
    """Whom it knows."""


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "localhost:65535", "a-b.example_1:80", "[::1]:7400", "[::]:0"]
)
def test_an_address_is_host_and_port(address):
    assert Addressed(listen=address, peers=[address, f"dns:///{address}"]).listen == address


@pytest.mark.parametrize(
    "address",
    [
        *("", "host", "host:", ":80", "host:port", "host:65536", "host:-1", "host:80 ", "::1:80"),
        *("http://host:80", "host:80/path", "[::1]", "a b:80", "dns://host:80"),
    ],
)
def test_anything_else_is_refused_under_the_name_of_its_key(address):
    for values, key in (({"listen": address}, "listen"), ({"peers": [address]}, "peers[0]")):
        with pytest.raises(InvalidRequest) as caught:
            Addressed.parse(values, source="file")
        assert str(caught.value) == (
            f"file: {key}: {address!r} is not host:port, with a port of 0 to 65535"
        )


def test_nobody_listens_at_a_name_to_be_looked_up_again_and_again():
    with pytest.raises(InvalidRequest, match="listen"):
        Addressed.parse({"listen": "dns:///host:80"}, source="file")


# --- running -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("no such model"), 2),
        (Unavailable("the port is taken"), 1),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [Unavailable("the port is taken")])]), 1),
    ],
)
def test_what_keeps_a_service_from_running_is_one_line(capsys, error, status):
    async def service():
        raise error

    with pytest.raises(SystemExit) as ended:
        run(service())
    assert ended.value.code == status
    said = "no such model\n" if status == 2 else "the port is taken\n"
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback():
    async def service():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(service())


def test_a_service_that_ends_well_ends_quietly(capsys):
    async def service():
        pass

    run(service())
    assert capsys.readouterr().err == ""
