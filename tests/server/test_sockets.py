"""Where a server listens: found out before a model is loaded."""

import socket

import pytest

from isobit.cli import main
from isobit.errors import UsageError
from isobit.server.sockets import address, bound, listen, unguarded
from tests.server.conftest import free_port


def test_nobody_can_connect_before_it_listens() -> None:
    (mine,) = bound("127.0.0.1", 0)
    with mine:
        at = mine.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(at)
        listen([mine])
        socket.create_connection(at).close()
        assert address("127.0.0.1", [mine]) == f"http://127.0.0.1:{at[1]}"


@pytest.mark.parametrize(("host", "others"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_whom_a_server_without_a_key_answers_is_known(host: str, others: bool) -> None:
    (mine,) = bound(host, 0)
    with mine:
        assert unguarded([mine], None) is others
        assert not unguarded([mine], "key")


def test_one_server_has_a_port() -> None:
    port = free_port()
    (first,), (second,) = bound("127.0.0.1", port), bound("127.0.0.1", port)  # none listens yet
    with first, second:
        listen([first])
        with pytest.raises(UsageError, match=f"127.0.0.1:{port}: expected .* free .*in use"):
            listen([second])
        with pytest.raises(UsageError, match=f":{port}: expected"):
            bound("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 300, "\udcff"])
def test_a_host_that_is_not_here(host: str) -> None:
    with pytest.raises(UsageError, match="expected an address of this machine"):
        bound(host, 8000)


def test_all_addresses_of_a_host() -> None:
    port = free_port()
    sockets = bound("localhost", port)
    listen(sockets)
    for s in sockets:
        socket.create_connection(s.getsockname()[:2]).close()
        s.close()
    assert sockets


@pytest.mark.parametrize("command", [["serve", "no-such-model.gguf"], ["front", "http://x"]])
def test_a_taken_port_is_refused_before_anything_else(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOBIT_FRONT_KEY", "key")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*command, "--port", str(port)]) == UsageError.exit_code
    assert f"127.0.0.1:{port}: expected" in capsys.readouterr().err
