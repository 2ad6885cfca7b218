"""What is appended to a log is passed through once; a closed stream ends nothing."""

from __future__ import annotations

import io
from pathlib import Path

from dstrain.launcher.output import LogFollower


class _Closed(io.BytesIO):
    def write(self, data: object) -> int:
        raise BrokenPipeError


def test_what_is_appended_while_it_is_followed_is_copied_to_the_last_byte(tmp_path: Path) -> None:
    log, out = tmp_path / "log", io.BytesIO()
    log.write_bytes(b"earlier\n")
    with LogFollower(log, out), log.open("ab") as file:
        for number in range(2000):
            file.write(b"line %d\n" % number)
    assert out.getvalue() == b"".join(b"line %d\n" % number for number in range(2000))


def test_a_stream_whose_reader_has_left_does_not_raise(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.touch()
    with LogFollower(log, _Closed()):
        log.write_bytes(b"text")
    assert log.read_bytes() == b"text"
