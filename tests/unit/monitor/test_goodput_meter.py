import dataclasses
import json
import os
import random
import subprocess
import sys
import time

import pytest

from dstrain.base.protocols import StepReport
from dstrain.monitor.goodput import account
from dstrain.monitor.goodput_meter import Clock, GoodputMeter, note_end, read_attempts


class World:
    """A simulated machine: one true time, a wall clock that may be wrong, processes that start now."""

    def __init__(self):
        self.true, self.wall_error, self.boot = 50_000.0, 0.0, "boot-1"
        self.started = self.true

    def process(self):
        self.started = self.true
        return Clock(
            wall=lambda: 1.7e9 + self.true + self.wall_error,
            uptime=lambda: self.true,
            process_started=lambda begun=self.started: begun,
            boot=lambda: self.boot,
        )


def report(step, /, **seconds):
    return StepReport(
        step=step, loss=1.0, accuracy=0.0, gradient_norm=1.0, learning_rate=1e-4, applied=True, num_tokens=1, num_targets=1,
        num_rows=1, padded_tokens=1, ledger=1, epoch=0.0, seconds={**seconds, "total": sum(seconds.values())},
    )  # fmt: skip


def take_step(world, meter, step, /, **seconds):
    world.true += sum(seconds.values())
    meter.step(report(step, **seconds))


def test_the_parts_of_a_life_go_into_their_buckets(tmp_path):
    world = World()
    meter = GoodputMeter(tmp_path, clock=world.process())
    world.true += 7.0  # imports
    meter.start()
    world.true += 3.0
    meter.part("restore", 2.0)
    meter.start(resumed_step=4)
    take_step(world, meter, 5, data=0.5, forward_backward=2.0, step=0.5, other=0.25)
    take_step(world, meter, 6, data=0.5, forward_backward=2.0, step=0.5, save=1.0, evaluate=1.5)
    world.true += 0.75
    meter.end("complete")
    seconds = account(read_attempts(tmp_path)).seconds
    assert {k: v for k, v in seconds.items() if v} == pytest.approx(
        {
            "start_up": 8.0,
            "restore": 2.0,
            "data_wait": 1.0,
            "productive": 5.0,
            "other": 1.0,
            "save_stall": 1.0,
            "evaluate": 1.5,
        }
    )
    record = read_attempts(tmp_path)[0]
    assert (record.number, record.resumed_step, record.step, record.outcome) == (1, 4, 6, "complete")


def test_time_told_outside_of_steps_and_again_in_the_report_counts_once(tmp_path):
    world = World()
    meter = GoodputMeter(tmp_path, clock=world.process())
    meter.start()
    take_step(world, meter, 1, forward_backward=1.0)
    world.true += 4.0
    meter.part("evaluate", 4.0)
    world.true += 1.0
    meter.step(report(2, forward_backward=1.0, evaluate=4.0))
    seconds = meter.total().seconds
    assert (seconds["evaluate"], seconds["productive"], meter.total().wall_s) == (4.0, 2.0, 6.0)


def test_parts_that_claim_more_than_went_by_are_scaled_down(tmp_path):
    world = World()
    meter = GoodputMeter(tmp_path, clock=world.process())
    meter.start()
    world.true += 1.0
    meter.step(report(1, forward_backward=3.0, data=1.0))
    meter.part("restore", 99.0)
    assert meter.total().wall_s == pytest.approx(1.0)
    assert meter.total().seconds["productive"] == pytest.approx(0.75)


def test_steps_that_an_earlier_attempt_reached_are_replayed_and_so_are_those_of_a_roll_back(tmp_path):
    world = World()
    first = GoodputMeter(tmp_path, clock=world.process(), record_every_s=0.0)
    first.start()
    for step in range(1, 8):
        take_step(world, first, step, forward_backward=1.0)
    world.true += 60.0  # killed
    second = GoodputMeter(tmp_path, clock=world.process(), record_every_s=0.0)
    second.start(resumed_step=5)
    for step in (6, 7, 8, 9, 8, 9, 10):  # rolled back by two steps after 9
        take_step(world, second, step, forward_backward=1.0)
    goodput = second.total()
    assert (goodput.seconds["productive"], goodput.seconds["replayed"], goodput.replayed_steps) == (10.0, 4.0, 4)
    assert goodput.step == 10
    assert goodput.seconds["down"] == 60.0


class Truth:
    """What really happened in a simulated history, counted apart from the meter."""

    def __init__(self, world):
        self.world, self.seconds, self.reached, self.replayed = world, {}, 0, 0

    def spend(self, bucket, seconds):
        self.world.true += seconds
        self.seconds[bucket] = self.seconds.get(bucket, 0.0) + seconds
        return seconds

    def step(self, step, parts):
        again = step <= self.reached
        self.reached, self.replayed = max(self.reached, step), self.replayed + again
        names = {"data": "data_wait", "save": "save_stall", "evaluate": "evaluate", "other": "other"}
        for name, seconds in parts.items():
            self.spend(names.get(name, "replayed" if again else "productive"), seconds)


LENGTH = 120


def attempt(meter, truth, rng, *, resumed):
    """Start, restore and step until done or until a random moment; returns the last saved step and whether it is done."""
    truth.spend("start_up", rng.uniform(1, 20))
    meter.start()
    if resumed:
        meter.part("restore", truth.spend("restore", rng.uniform(0.1, 5)))
    meter.start(resumed)
    saved, deadline = resumed, truth.world.true + rng.expovariate(1 / 60)
    for step in range(resumed + 1, LENGTH + 1):
        parts = {"data": rng.uniform(0, 0.1), "forward_backward": rng.uniform(0.3, 1.0), "step": 0.1, "other": 0.02}
        parts |= {"save": rng.uniform(0.05, 0.5)} if step % 10 == 0 else {}
        parts |= {"evaluate": rng.uniform(0.5, 2.0)} if step % 25 == 0 else {}
        if truth.world.true + sum(parts.values()) > deadline:
            return saved, False
        truth.step(step, parts)
        meter.step(report(step, **parts))
        saved = step if step % 10 == 0 else saved
    return saved, True


@pytest.mark.parametrize("seed", range(50))
def test_buckets_of_random_failure_traces_are_the_true_ones_and_sum_to_the_wall_time(tmp_path, seed):
    """Attempts end at random moments by kills, hangs, stops and failures; the wall clock jumps by hours all the time."""
    rng, world = random.Random(seed), World()
    truth, begun, saved, done = Truth(world), world.true, 0, False
    while not done:
        meter = GoodputMeter(tmp_path, clock=world.process(), record_every_s=0.0)
        saved, done = attempt(meter, truth, rng, resumed=saved)
        if done:
            meter.end("complete")
            break
        ending = rng.choice(["killed", "hang", "saved", "failed"])
        stepped = read_attempts(tmp_path)[-1].step > read_attempts(tmp_path)[-1].resumed_step
        silent = {"hang": "hang", "killed": "down"}.get(ending, "other" if stepped else "start_up")
        truth.spend(silent, rng.uniform(0, 1) if ending != "hang" else rng.uniform(30, 120))
        if ending == "hang":
            note_end(tmp_path, "hang", ended_at=1.7e9 + world.true + world.wall_error)
        elif ending != "killed":
            meter.end(ending)
        world.wall_error += rng.uniform(-7200, 7200)
        truth.spend("queue" if ending == "saved" else "down", rng.uniform(1, 300))
    goodput = account(read_attempts(tmp_path))
    assert goodput.wall_s == pytest.approx(world.true - begun, rel=0.01)
    assert {k: v for k, v in goodput.seconds.items() if v} == pytest.approx(truth.seconds, rel=0.01, abs=0.01)
    assert (goodput.step, goodput.replayed_steps) == (LENGTH, truth.replayed)


def test_a_wall_clock_that_jumps_back_while_the_machine_restarts_gives_no_negative_time(tmp_path):
    world = World()
    first = GoodputMeter(tmp_path, clock=world.process(), record_every_s=0.0)
    first.start()
    take_step(world, first, 1, forward_backward=100.0)
    world.boot, world.wall_error = "boot-2", -1e6
    second = GoodputMeter(tmp_path, clock=world.process(), record_every_s=0.0)
    second.start(1)
    take_step(world, second, 2, forward_backward=50.0)
    assert second.total().wall_s == 150.0
    assert min(second.total().seconds.values()) == 0.0


def test_records_are_written_now_and_then_and_not_every_step(tmp_path):
    world = World()
    meter = GoodputMeter(tmp_path, clock=world.process(), record_every_s=10.0)
    meter.start()
    steps_on_disk = []
    for step in range(1, 26):
        take_step(world, meter, step, forward_backward=1.0)
        steps_on_disk.append(read_attempts(tmp_path)[0].step)
    assert sorted(set(steps_on_disk)) == [0, 10, 20]


def test_other_ranks_write_nothing(tmp_path):
    meter = GoodputMeter(tmp_path, active=False)
    meter.start()
    meter.step(report(1, forward_backward=1.0))
    meter.end("complete")
    assert list(tmp_path.iterdir()) == []
    assert meter.total().wall_s == 0.0


def test_a_noted_end_does_not_overwrite_what_the_attempt_said_itself(tmp_path):
    world = World()
    meter = GoodputMeter(tmp_path, clock=world.process())
    meter.start()
    meter.end("saved")
    note_end(tmp_path, "hang", ended_at=2e9)
    assert read_attempts(tmp_path)[0].outcome == "saved"
    note_end(tmp_path / "no run", "hang")  # nothing to note: nothing happens
    assert not (tmp_path / "no run").exists()


def test_an_unwritable_folder_is_counted_and_said_once_and_the_account_goes_on(tmp_path, messages):
    world = World()
    (tmp_path / "attempts").write_text("a file where the folder should be")
    meter = GoodputMeter(tmp_path, clock=world.process(), record_every_s=0.0)
    meter.start()
    take_step(world, meter, 1, forward_backward=2.0)
    assert meter.dropped == 2
    assert len([m for m in messages if "account of this run's time" in m]) == 1
    assert meter.total().seconds["productive"] == 2.0


@pytest.mark.parametrize(
    "damage",
    [
        "", "[1, 2]", '"number"', "17", "{}", "null", "not json", "[" * 100_000,
        '{"number": 1, "started_at": 1, "elapsed_s": NaN}',
        '{"number": 1, "started_at": 1, "elapsed_s": "5"}',
        '{"number": 1, "started_at": 1, "elapsed_s": 5, "seconds": [1]}',
        '{"number": 1, "started_at": 1, "elapsed_s": 5, "seconds": {"productive": Infinity}}',
        '{"number": 1.5, "started_at": 1, "elapsed_s": 5}',
        '{"number": 1, "started_at": 1, "elapsed_s": 5, "outcome": "perfect"}',
        '{"number": 1, "started_at": 1, "elapsed_s": 5, "step": "9"}',
        '{"number": 1, "started_at": 1, "elapsed_s": 5, "x": "' + "y" * 70_000 + '"}',
    ],
)  # fmt: skip
def test_damaged_records_are_left_out(tmp_path, damage):
    world = World()
    for _ in (1, 2):
        meter = GoodputMeter(tmp_path, clock=world.process())
        meter.start()
        meter.end("saved")
    (tmp_path / "attempts" / "0001.json").write_text(damage)
    assert [a.number for a in read_attempts(tmp_path)] == [2]
    third = GoodputMeter(tmp_path, clock=world.process())
    third.start()
    assert [a.number for a in read_attempts(tmp_path)] == [2, 3]


def test_records_are_plain_json_that_reads_back_equal(tmp_path):
    world = World()
    meter = GoodputMeter(tmp_path, clock=world.process())
    meter.start(3)
    meter.end("saved")
    record = read_attempts(tmp_path)[0]
    assert json.loads((tmp_path / "attempts" / "0001.json").read_text()) == dataclasses.asdict(record)


def test_the_start_of_a_real_process_is_before_its_imports():
    code = (
        "import time; begun = time.clock_gettime(time.CLOCK_BOOTTIME)\n"
        "from dstrain.monitor.goodput_meter import Clock\n"
        "clock = Clock(); started = clock.process_started()\n"
        "assert 0 <= started <= begun <= clock.uptime(), (started, begun)\n"
        "assert begun - started < 60, (started, begun)\n"
        "assert clock.boot()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_this_process_is_as_old_as_the_kernel_says():
    clock = Clock()
    age = clock.uptime() - clock.process_started()
    ticks = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    assert age == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks, abs=1.0)
