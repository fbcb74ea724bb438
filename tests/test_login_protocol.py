"""What the two ends of a login say to each other."""

from __future__ import annotations

import json

import pytest

from distpool.managers.login_protocol import MARK, MAX_LINE, EventReader, LoginSettings, pack_event


def test_settings_travel_as_one_line() -> None:
    settings = LoginSettings(cookie="c", count="auto", env={"A": "line\nend ü"}, tls={"certificate": "x", "key": "y"})
    line = settings.to_line()
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert LoginSettings.from_line(line) == settings


def test_either_side_may_be_newer() -> None:
    assert LoginSettings.from_line(b'{"cookie": "c", "of_the_future": 1}').cookie == "c"
    assert LoginSettings.from_line(b"{}") == LoginSettings()


@pytest.mark.parametrize("line", [b"", b"[]", b"5", b"{", b"\xff"])
def test_what_is_no_order(line: bytes) -> None:
    with pytest.raises(ValueError):
        LoginSettings.from_line(line)


STREAM = (
    b"Welcome\nlast login: distpool_logi\n\n"
    + MARK
    + pack_event(address="10.0.0.1", cpus=2)
    + pack_event(worker=0, port=5)
    + pack_event(b"two\nlines\n", output=0)
    + pack_event(exited=0, status=-9)
)
EVENTS = [
    ({"address": "10.0.0.1", "cpus": 2}, b""),
    ({"worker": 0, "port": 5}, b""),
    ({"output": 0, "size": 10}, b"two\nlines\n"),
    ({"exited": 0, "status": -9}, b""),
]


@pytest.mark.parametrize("size", [1, 2, 7, 20, 10_000])
def test_events_come_in_any_pieces(size: int) -> None:
    reader = EventReader()
    found = []
    for begin in range(0, len(STREAM), size):
        found += list(reader.feed(STREAM[begin : begin + size]))
    assert found == EVENTS and reader.begun
    assert reader.said() == b"Welcome\nlast login: distpool_logi\n\n"


def test_lines_before_the_mark_are_counted_and_the_last_kept() -> None:
    reader = EventReader()
    for _ in range(5000):
        assert not list(reader.feed(b"noise and more\n"))
    assert reader.lines == 5000 and reader.said().endswith(b"more\n")
    assert len(reader.said()) <= EventReader.KEPT + len(MARK)
    assert [event for event, _ in reader.feed(b"x" + STREAM)] == [event for event, _ in EVENTS]


@pytest.mark.parametrize("data", [b"no json\n", b"[1]\n", b'"x"\n', b"x" * (MAX_LINE + 1)])
def test_garbage_behind_the_mark(data: bytes) -> None:
    reader = EventReader()
    with pytest.raises(ValueError):
        list(reader.feed(MARK + data))


@pytest.mark.parametrize("noise", [b"hello\n", b"5\n", b"[1]\n", b"{\n", b"\xff\xfe\n", b"no end"])
def test_noise_between_events(noise: bytes) -> None:
    """What a start-up file left running in the background prints: Agent._say begins a line for each event."""
    reader = EventReader()
    pieces = [MARK + pack_event(address="a"), pack_event(b"two\nlines\n", output=0), pack_event(exited=0)]
    found = list(reader.feed(b"".join(b"\n" + piece + noise for piece in pieces)))
    assert [event for event, _ in found] == [{"address": "a"}, {"output": 0, "size": 10}, {"exited": 0}]
    assert noise.strip() in reader.said()


def test_secrets_of_an_order() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49\nAgEGCCqGSM49AwEH\n-----END PRIVATE KEY-----\n"
    order = LoginSettings(cookie="0123456789abcdef", tls={"certificate": "x", "key": key})
    assert order.secrets() == ["0123456789abcdef", "MIGHAgEAMBMGByqGSM49", "AgEGCCqGSM49AwEH"]
    assert all(piece.encode() in order.to_line() for piece in order.secrets())
    assert LoginSettings().secrets() == LoginSettings(cookie="short").secrets() == []


def test_events_are_json_lines() -> None:
    assert json.loads(pack_event(worker=1)) == {"worker": 1}
    assert pack_event(b"ab", output=1).endswith(b"}\nab")
