"""One browser for all tests of a session; where there is none, they are skipped and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.browser import Browser, obtain


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    reason = obtain()
    if reason:
        pytest.skip(reason)
    with Browser(width=1600, height=1200) as started:
        yield started
