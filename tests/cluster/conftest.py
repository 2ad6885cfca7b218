"""One cluster for all tests of a session: built at the first, mended after each, taken down at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cluster import Lab, LabError, missing


@pytest.fixture(scope="session")
def _lab() -> Iterator[Lab]:
    reason = missing()
    if reason:
        pytest.skip(f"no cluster can be built here: {reason}")
    try:
        lab = Lab.build()
    except LabError as error:
        pytest.skip(f"no cluster can be built here: {error}")
    yield lab
    lab.take_down()


@pytest.fixture
def lab(_lab: Lab) -> Iterator[Lab]:
    """Two idle nodes and a login node."""
    yield _lab
    _lab.mend()
