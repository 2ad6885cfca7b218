import io
import logging

from dstrain.base.protocols import StepReport
from dstrain.base.world import World
from dstrain.monitor.terminal import TerminalLine, progress_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report(step, *, applied=True, total=2.0):
    return StepReport(
        step=step,
        loss=3.25,
        accuracy=0.125,
        gradient_norm=1.0,
        learning_rate=1e-4,
        applied=applied,
        num_tokens=1000,
        num_targets=150,
        num_rows=8,
        padded_tokens=1024,
        ledger=1,
        epoch=0.1,
        seconds={"total": total},
    )


def show(line, step, *, is_logged):
    line.show(report(step), tokens_per_second=12_345.0, padding_percent=2.3, is_logged=is_logged)


def test_the_line_says_where_the_run_stands():
    text = progress_line(
        report(50), max_steps=1000, tokens_per_second=12_345.0, padding_percent=2.3, remaining_seconds=1900.0
    )
    assert text == "step 50/1,000 | loss 3.2500 | acc 12.5 % | lr 1.00e-04 | 12.3k tok/s | pad 2.3 % | ETA 0:31:40"


def test_a_skipped_step_is_said():
    text = progress_line(
        report(5, applied=False), max_steps=9, tokens_per_second=1.0, padding_percent=0.0, remaining_seconds=0.0
    )
    assert "SKIPPED" in text


def test_without_a_terminal_only_logged_steps_make_a_log_line(messages):
    stream = io.StringIO()
    line = TerminalLine(World(), max_steps=100, stream=stream)
    for step in range(1, 5):
        show(line, step, is_logged=step == 3)
    assert stream.getvalue() == ""
    assert len(messages) == 1
    assert messages[0].startswith("step 3/100 ")
    assert messages[0].endswith("ETA 0:03:14")  # 97 steps of 2 s


def test_on_a_terminal_one_line_is_rewritten_and_nothing_is_logged(messages):
    stream = Terminal()
    line = TerminalLine(World(), max_steps=2, stream=stream)
    show(line, 1, is_logged=True)
    show(line, 2, is_logged=True)
    line.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text.count("\r") == 2
    assert "step 2/2" in text
    assert messages == []


def test_a_log_line_wipes_the_live_line_first_and_only_while_it_lives():
    stream = Terminal()
    logger = logging.getLogger("dstrain")
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        line = TerminalLine(World(), max_steps=2, stream=stream)
        show(line, 1, is_logged=False)
        logger.warning("hello")
        assert stream.getvalue().endswith("\r\x1b[Khello\n")
        line.close()
        logger.warning("bye")
        assert stream.getvalue().endswith("\nbye\n")
    finally:
        logger.removeHandler(handler)


def test_other_ranks_are_silent(messages):
    stream = Terminal()
    line = TerminalLine(World(rank=1, size=2), max_steps=2, stream=stream)
    show(line, 1, is_logged=True)
    line.close()
    assert stream.getvalue() == ""
    assert messages == []


def test_a_terminal_that_goes_away_does_not_stop_the_run():
    stream = Terminal()
    line = TerminalLine(World(), max_steps=2, stream=stream)
    stream.close()
    line._live = True
    show(line, 1, is_logged=True)
    show(line, 2, is_logged=True)
    assert line._live is False
