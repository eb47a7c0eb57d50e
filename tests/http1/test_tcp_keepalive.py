"""TCP keepalive as a policy has it (K18), on each platform."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2keep import Keepalive
from h2keep._fallback import tcp_keepalive

if TYPE_CHECKING:
    from collections.abc import Iterable

ON = (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def figures(options: Iterable[tuple[object, ...]]) -> list[object]:
    return [option[2] for option in options]


@pytest.mark.parametrize(
    ("keepalive", "idle", "interval", "count"),
    [
        (Keepalive(), 30, 5, 3),
        (Keepalive(30.0, 10.0), 30, 3, 3),
        (Keepalive(10.0, 20.0), 10, 6, 3),
        (Keepalive(0.2, 0.3), 1, 1, 3),
        (Keepalive(59.6, 5.0), 60, 1, 5),
        (Keepalive(1e6, 1e6), 32767, 32767, 31),
    ],
)
def test_k18_the_figures_follow_the_policy(keepalive: Keepalive, idle: int, interval: int, count: int) -> None:
    assert tcp_keepalive(keepalive) == [
        ON,
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count),
    ]


def test_k18_there_is_none_where_keepalive_is_off() -> None:
    assert tcp_keepalive(Keepalive(None)) == []


@settings(deadline=None)
@given(st.floats(0.001, 1e9), st.floats(0.001, 1e9))
def test_k18_the_system_takes_whatever_the_policy(read_idle_timeout: float, ping_timeout: float) -> None:
    options = tcp_keepalive(Keepalive(read_idle_timeout, ping_timeout))
    with socket.socket() as sock:
        for option in options:
            sock.setsockopt(*option)
    _, _, interval, count = figures(options)
    assert isinstance(interval, int)
    assert isinstance(count, int)
    assert count >= 3
    if 3 <= ping_timeout <= 98_000:
        assert interval * count == pytest.approx(ping_timeout, rel=0.34)


def test_k18_macos_has_another_name_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    monkeypatch.setattr(socket, "TCP_KEEPALIVE", 0x10, raising=False)
    assert tcp_keepalive(Keepalive())[1] == (socket.IPPROTO_TCP, 0x10, 30)


def test_k18_platforms_with_less_get_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL", "TCP_KEEPCNT"):
        monkeypatch.delattr(socket, name, raising=False)
    assert tcp_keepalive(Keepalive()) == [ON]
