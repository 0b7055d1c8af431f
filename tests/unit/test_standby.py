"""Which processes are one another's successors, and where they are reached."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from services.coordinator import standby
from services.coordinator.standby import _place, _reached_at


def test_who_listens_where_another_did_is_its_successor_and_nobody_else():
    assert _place("10.0.0.1", 7400) == _place("10.0.0.1", 7400)
    others = {("10.0.0.1", 7400), ("10.0.0.2", 7400), ("10.0.0.1", 7401), ("[::]", 7400)}
    assert len({_place(*other) for other in others}) == len(others)


def test_the_same_port_of_another_network_is_another_place(tmp_path, monkeypatch):
    def place(network):
        link = tmp_path / network
        link.symlink_to(f"net:[{network}]")
        monkeypatch.setattr(standby, "_NETWORK", link)
        return _place("[::]", 7400)

    assert place("1") != place("2")


def test_the_network_is_known_on_this_system():
    if not Path("/proc/self/ns/net").is_symlink():
        pytest.skip("no network namespaces here")
    assert "net:[" in _place("127.0.0.1", 1)


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("0.0.0.0", socket.gethostname()),  # noqa: S104 - what is tested
        ("[::]", socket.gethostname()),
        ("10.0.0.1", "10.0.0.1"),
        ("[::1]", "[::1]"),
    ],
)
def test_who_listens_everywhere_is_reached_by_the_machines_name(host, reached):
    assert _reached_at(host, 7400) == f"{reached}:7400"
