"""One verdict for all ranks: the strongest word counts, silence counts as death, launchers are believed only without files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import ExitCode
from dstrain.base.world import World
from dstrain.health.outcomes import write_exit
from dstrain.launcher.outcome import Outcome, RankExit, judge, read_exits


def _exits(*codes: int | None, causes: tuple[str, ...] = ()) -> list[RankExit]:
    size = len(codes)
    causes = causes or tuple(f"cause {rank}" for rank in range(size))
    return [
        RankExit(rank, ExitCode(code), causes[rank], 7, f"host{rank}", size)
        for rank, code in enumerate(codes)
        if code is not None
    ]


def _judge(*codes: int | None, launcher: int = 1, **kwargs: Any) -> Outcome:
    return judge(_exits(*codes, **kwargs), launcher_code=launcher, expected=True)


def test_what_ranks_write_is_read(tmp_path: Path) -> None:
    write_exit(tmp_path, World(rank=1, size=2), code=ExitCode.RETRY_HERE, cause="disk", step=9)
    (tmp_path / "exit" / "rank-00000.json").write_text("{torn")
    (tmp_path / "exit" / "rank-00002.json").write_text(json.dumps({"rank": 2, "code": 999}))
    [found] = read_exits(tmp_path)
    assert (found.rank, found.code, found.cause, found.step, found.world_size) == (1, 76, "disk", 9, 2)
    assert read_exits(tmp_path / "new") == ()


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((82, 75), 82), ((82, 82), 82),
        ((76, 1), 76), ((1, 1), 1), ((1, 78), 78), ((77, 76), 77), ((80, 1), 80),
        ((79, 78), 78), ((81, None), 81), ((77, None), 77), ((0, None), None), ((75, None), None), ((1, None), None),
    ],
)  # fmt: skip
def test_the_strongest_word_counts_and_a_missing_one_beats_a_crash_that_it_caused(
    codes: tuple[int | None, ...], expected: int | None
) -> None:
    assert _judge(*codes, launcher=0).code == expected


def test_the_verdict_names_ranks_hosts_and_cause() -> None:
    found = _judge(1, 77, 77)
    assert (found.ranks, found.hosts, found.cause) == ((1, 2), ("host1", "host2"), "cause 1")
    silent = _judge(1, None, causes=("connection closed by peer", ""))
    assert silent.ranks == (1,)
    assert "rank 1 ended without a word" in silent.cause
    assert "connection closed by peer" in silent.cause


def test_a_stop_is_deliberate_unless_only_a_signal_or_a_lost_launcher_was_its_reason() -> None:
    assert not _judge(75, 75, causes=("complete", "SIGTERM")).deliberate
    assert not _judge(75, 75, causes=("the launcher is gone", "saved_requeue")).deliberate
    asked = _exits(75, 75, causes=("SIGUSR1", "saved_requeue"))
    assert judge(asked, launcher_code=75, expected=True, signals_are_requests=True).deliberate
    lost = _exits(75, 75, causes=("the launcher is gone", "saved_requeue"))
    assert not judge(lost, launcher_code=75, expected=True, signals_are_requests=True).deliberate
    assert _judge(75, 75, causes=("the budget of 3 hours is used up", "saved_requeue")).deliberate
    assert _judge(75, 75, causes=("complete", "complete")).deliberate


@pytest.mark.parametrize(
    ("launcher", "expected", "code"),
    [(78, True, 78), (0, True, None), (0, False, 0), (247, True, None), (-9, False, None)],
)
def test_without_files_a_launcher_is_believed_but_not_its_zero(launcher: int, expected: bool, code: int | None) -> None:
    assert judge([], launcher_code=launcher, expected=expected).code == code


@pytest.mark.parametrize(
    ("codes", "kinds", "expected", "ranks"),
    [
        ((76, 76), ("peer", "fault"), 76, (1,)),  # one died, the other missed it
        ((76, 1), ("peer", "defect"), 1, (1,)),
        ((77, 77, 77), ("peer", "fault", "peer"), 77, (1,)),  # a fault that all have agreed on
        ((76, 76), ("peer", "peer"), 76, (0, 1)),  # cut off from each other
        ((75, 76), ("request", "peer"), 76, (1,)),
        ((76, None), ("peer", ""), None, (1,)),
    ],
)
def test_who_only_suffered_from_another_rank_is_not_to_blame(
    codes: tuple[int | None, ...], kinds: tuple[str, ...], expected: int | None, ranks: tuple[int, ...]
) -> None:
    exits = [dataclasses.replace(left, kind=kinds[left.rank]) for left in _exits(*codes)]
    found = judge(exits, launcher_code=1, expected=True)
    assert (found.code, found.ranks) == (expected, ranks)
