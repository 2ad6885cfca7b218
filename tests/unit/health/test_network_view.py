"""Links that went down and a meeting point that answers or not, on made-up interfaces and real sockets."""

from __future__ import annotations

import socket
from pathlib import Path

from dstrain.health.network_view import NetworkView


def _card(folder: Path, name: str, carrier: str | None, *, physical: bool = True) -> None:
    (folder / name).mkdir(exist_ok=True)
    if physical:
        (folder / name / "device").touch()
    if carrier is None:
        (folder / name / "carrier").unlink(missing_ok=True)
    else:
        (folder / name / "carrier").write_text(carrier)


def test_only_links_of_cards_that_were_up_before_are_lost(tmp_path: Path) -> None:
    for name, carrier in {"eth0": "1\n", "eth1": "0\n", "ib0": "1\n", "lo": "1\n", "off": None}.items():
        _card(tmp_path, name, carrier)
    _card(tmp_path, "veth7", "1\n", physical=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        view = NetworkView(server.getsockname(), interfaces=tmp_path)
        assert view.facts() == {"lost_links": [], "reaches_meeting_point": True}
        _card(tmp_path, "eth0", "0\n")
        _card(tmp_path, "ib0", None)
        for name in ("lo", "veth7"):
            _card(tmp_path, name, "0\n")
        assert view.facts() == {"lost_links": ["eth0", "ib0"], "reaches_meeting_point": True}


def test_a_job_on_one_host_asks_nobody_and_loses_nothing(tmp_path: Path) -> None:
    _card(tmp_path, "eth0", "1\n")
    view = NetworkView(None, interfaces=tmp_path)
    _card(tmp_path, "eth0", "0\n")
    assert view.facts() == {"lost_links": [], "reaches_meeting_point": None}


def test_a_host_without_interfaces_to_look_at_is_no_fault(tmp_path: Path) -> None:
    view = NetworkView(("127.0.0.1", 1), interfaces=tmp_path / "missing")
    assert view.facts()["lost_links"] == []


def test_a_refusal_is_an_answer_and_silence_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    assert NetworkView(address).facts()["reaches_meeting_point"] is True
    with socket.socket() as full:  # a queue that is taken: a further connection hears nothing
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        taken = [socket.socket() for _ in range(4)]
        for client in taken:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        assert NetworkView(full.getsockname()).facts(timeout_s=0.05)["reaches_meeting_point"] is False
        for client in taken:
            client.close()


def test_an_unknown_name_says_nothing() -> None:
    assert NetworkView(("no host has this name", 1)).facts()["reaches_meeting_point"] is None
