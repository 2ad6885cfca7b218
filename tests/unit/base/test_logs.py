import logging
import sys

import pytest

from dstrain.base.logs import configure_logs, get_logger
from dstrain.base.world import World


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
    monkeypatch.delenv("DSTRAIN_LOG_LEVEL", raising=False)
    root = logging.getLogger("dstrain")
    before, hook = (root.handlers[:], root.propagate, root.level), sys.excepthook
    yield
    root.handlers[:], root.propagate = before[:2]
    root.setLevel(before[2])
    sys.excepthook = hook


def say(capsys):
    logger = get_logger("dstrain.somewhere")
    logger.debug("a detail")
    logger.info("progress")
    logger.warning("trouble")
    return capsys.readouterr().err


@pytest.mark.parametrize(("name", "full"), [("dstrain.base.logs", "dstrain.base.logs"), ("tool", "dstrain.tool")])
def test_every_logger_hangs_below_the_root(name, full):
    assert get_logger(name).name == full


def test_the_first_rank_speaks_of_progress(capsys):
    configure_logs(World(rank=0, size=2))
    text = say(capsys)
    assert "progress" in text
    assert "trouble" in text
    assert "a detail" not in text
    assert "[rank" not in text


def test_other_ranks_speak_only_of_trouble_and_say_who_they_are(capsys):
    configure_logs(World(rank=1, size=2))
    text = say(capsys)
    assert "progress" not in text
    assert text.rstrip().endswith("[rank 1] trouble")


def test_the_level_comes_from_the_caller_then_from_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("DSTRAIN_LOG_LEVEL", "debug")
    configure_logs(World())
    assert "a detail" in say(capsys)
    configure_logs(World(), level="error")
    assert say(capsys) == ""


def test_configuring_twice_does_not_say_everything_twice(capsys):
    configure_logs(World())
    configure_logs(World())
    assert say(capsys).count("trouble") == 1


def test_secrets_are_replaced_in_lines_arguments_and_tracebacks(capsys):
    configure_logs(World())
    logger = get_logger("dstrain.somewhere")
    logger.warning("cannot read %s", "https://anna:hunter2x@example.org/shards")
    try:
        raise OSError("password=hunter3x")
    except OSError:
        logger.exception("failed with token=%s", "hunter4xyz")
    text = capsys.readouterr().err
    assert "hunter" not in text
    assert text.count("<redacted>") == 4  # the second error is shown with its line of code
    assert "example.org/shards" in text
    assert "OSError" in text


def test_the_traceback_of_an_unexpected_error_is_cleaned(capsys):
    configure_logs(World())
    try:
        raise RuntimeError("no answer from https://anna:hunter2x@example.org")
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    text = capsys.readouterr().err
    assert "hunter2x" not in text
    assert text.startswith("Traceback")
    assert "RuntimeError: no answer from https://<redacted>@example.org" in text
