import dataclasses
import json

import pytest

from dstrain.health.clerk import Clerk
from dstrain.health.heartbeat import Ended, Phase
from dstrain.health.incident_response import IncidentResponse, alarm_of
from dstrain.health.incidents import HealthFolder
from dstrain.health.rank_view import RankView


@pytest.fixture
def pair(settings, tmp_path):
    """The answers of rank 0 of two, and the folder in which rank 1 has said that it runs."""
    settings = dataclasses.replace(settings, world_size=2, peer_grace_s=0.1)
    folder = HealthFolder(tmp_path, job=settings.job, first=1)
    folder.publish(1, {"ended": "", "phase": "step", "step": 12})
    return IncidentResponse(settings, RankView(settings), folder, Clerk()), folder


def exit_file(folder):
    return json.loads((folder / "exit" / "rank-00000.json").read_text())


@pytest.mark.parametrize(
    ("ended", "kind", "suspect", "said"),
    [
        (Ended.BY_A_FAULT, "left", 0, "left with a fault in phase step of step 12"),
        (Ended.BY_A_LOST_PEER, "lost", None, "left because another rank was gone in phase step of step 12"),
    ],
)
def test_who_leaves_with_a_fault_is_named_and_who_only_missed_another_is_not(
    pair, heartbeat, tmp_path, ended, kind, suspect, said
):
    response, folder = pair
    heartbeat.enter(Phase.STEP, 12)
    heartbeat.close(ended)
    response.left(response._view.beat())
    assert (folder.alarm()["kind"], folder.alarm()["rank"]) == (kind, 0)
    report = json.loads((tmp_path / "health" / "hang-report.json").read_text())
    assert report["finding"]["rank"] == suspect
    assert said in report["line"]


def test_nobody_is_alarmed_by_a_clean_end_or_when_all_have_noticed(pair, heartbeat):
    response, folder = pair
    folder.publish(1, {"ended": "peer lost", "phase": "step", "step": 12})
    heartbeat.close(Ended.BY_A_FAULT)
    response.left(response._view.beat())
    assert folder.alarm() is None


@pytest.mark.parametrize(("other", "kind", "blamed"), [("fault", "peer", 1), ("peer lost", "fault", 0)])
def test_a_dead_rank_is_the_cause_unless_another_had_a_fault_before(
    pair, rank, heartbeat, tmp_path, other, kind, blamed
):
    response, folder = pair
    facts = {"ended": other, "rank": 1, "host": "there", "pid": 1, "phase": "step", "step": 12, "time_in_phase_s": 0.1}
    folder.publish(1, {**facts, "state": "", "time": 1.0})
    heartbeat.enter(Phase.STEP, 12)
    beat = response._view.beat()
    rank.kill()
    rank.wait()
    response.died(beat, response._view.facts(beat))
    assert folder.alarm()["rank"] == blamed
    assert (exit_file(tmp_path)["code"], exit_file(tmp_path)["kind"]) == (76, kind)


def test_an_alarm_carries_what_others_need_to_know_of_the_rank(pair):
    response, _ = pair
    alarm = alarm_of("hung", response._view.facts(response._view.beat()), "no progress")
    assert (alarm["kind"], alarm["rank"], alarm["detail"], alarm["number"]) == ("hung", 0, "no progress", 0)
