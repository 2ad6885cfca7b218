from __future__ import annotations

import pickle

from dstrain.base.errors import DataError, ExitCode
from dstrain.foreign.refusal import REASONS, TarRefusedError


def test_a_refusal_keeps_its_reason_on_its_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(TarRefusedError("x.tar: refused", reason="link")))
    assert (str(error), error.reason) == ("x.tar: refused", "link")
    assert isinstance(error, DataError)
    assert error.exit_code == ExitCode.BAD_INPUT


def test_every_reason_has_words() -> None:
    assert all(name == name.lower() and len(text.split()) >= 2 for name, text in REASONS.items())
