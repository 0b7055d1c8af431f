"""What a channel takes for an address."""

from __future__ import annotations

import pytest

from rollmesh.errors import InvalidRequest
from rollmesh.rpc.channel import _target_of_several, channel


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("127.0.0.1:1,10.0.0.2:65535", "ipv4:127.0.0.1:1,10.0.0.2:65535"),
        (" 127.0.0.1:1 ,\t127.0.0.1:2", "ipv4:127.0.0.1:1,127.0.0.1:2"),
        ("[::1]:1, [fe80::2]:2", "ipv6:[::1]:1,[fe80::2]:2"),
    ],
)
def test_several_addresses_are_numbers_of_one_kind(text, target):
    assert _target_of_several(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "localhost:1,localhost:2",
        "127.0.0.1:1,[::1]:2",
        "127.0.0.1:1,",
        "127.0.0.1,127.0.0.2",
        "127.0.0.1:1,127.0.0.1:65536",
        "127.0.0.1:1,300.0.0.1:2",
        "::1:1,::1:2",
    ],
)
async def test_several_of_another_kind_are_refused_with_what_is_allowed(text):
    with pytest.raises(InvalidRequest, match="address") as refused:
        channel(text)
    assert refused.value.context["field"] == "address"
    assert refused.value.context["value"] == text
    assert "IPv4:port" in refused.value.context["allowed"]
