"""One zygote for all tests of this folder: its imports are paid once, and each rank starts in tens of milliseconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.zygote import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("zygote") / "zygote.log") as zygote:
        yield zygote
