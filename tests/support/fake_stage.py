"""A stage without torch for tests of the supervisor: ranks that step, save, leave exit files and fail as a plan says.

    python tests/support/fake_stage.py supervise RUN PLAN      the real supervisor around the two below
    python tests/support/fake_stage.py launch RUN PLAN         a launcher with DeepSpeed's manners: orphans when killed
    python tests/support/fake_stage.py rank RUN PLAN

A plan is JSON: `ranks`, `steps`, `save_every`, `step_s`, `policy` (of the supervisor), and `faults`: a list of
`{attempt, rank, step, do}` with `attempt` a number or null for all, and `do` an exit code with its word, "kill", "kill-launcher",
"crash" (no word), "hang-with-word" or "ignore-term".
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ExitCode
from dstrain.base.world import World
from dstrain.checkpoint.layout import checkpoints_folder, published_steps, step_folder
from dstrain.health.outcomes import write_exit

if TYPE_CHECKING:  # ranks start by the hundred: only the supervisor imports the supervisor
    from dstrain.launcher.starters import Command, Layout
    from dstrain.launcher.supervisor import Supervisor

FAST = {"first_wait_s": 0.02, "longest_wait_s": 0.1, "peer_grace_s": 0.5, "grace_s": 20.0, "max_restarts": 6}


def fake_command(role: str, run: Path, plan: Path) -> list[str]:
    """The argument list of a role."""
    return [sys.executable, __file__, role, str(run), str(plan)]


def build_fake(run: Path, plan: Path) -> Any:
    """What stands for `build_command`."""
    from dstrain.launcher.starters import NOT_INHERITED, Command

    def build(layout: Layout, arguments: Any, **_: Any) -> Command:
        role = "rank" if layout.starter == "python" else "launch"
        return Command(tuple(fake_command(role, run, plan)), {}, NOT_INHERITED)

    return build


def make_supervisor(run: Path, plan: Path, *, starter: Any = "deepspeed", say: Any = None) -> Supervisor:
    """The supervisor under test; its policy comes from the plan."""
    from dstrain.launcher.policy import RestartPolicy
    from dstrain.launcher.starters import Layout
    from dstrain.launcher.supervisor import Job, Supervisor

    given = json.loads(plan.read_text())
    job = Job("pretrain", run, ("pretrain",), Layout(starter, given.get("ranks", 2)), seed=1)
    policy = RestartPolicy(**{**FAST, **given.get("policy", {})})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return Supervisor(
        job, policy, say=say or _say, out=sys.stdout.buffer, environment=environment, build=build_fake(run, plan)
    )


def _say(text: str) -> None:
    print(f"dstrain launch: {text}", file=sys.stderr, flush=True)


def _launch(run: Path, plan: dict[str, Any], path: Path) -> int:
    size = plan.get("ranks", 2)
    ranks = [
        subprocess.Popen(
            fake_command("rank", run, path), env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size)}
        )
        for rank in range(size)
    ]
    while any(rank.poll() is None for rank in ranks):
        failed = [rank.returncode for rank in ranks if rank.poll() not in (None, 0)]
        if failed and not plan.get("careless"):
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.wait()
            return int(failed[0]) % 256
        time.sleep(0.02)
    return max(rank.returncode % 256 for rank in ranks)


class _Rank:
    def __init__(self, run: Path, plan: dict[str, Any]) -> None:
        self.run, self.plan = run, plan
        self.world = World(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))
        self.attempt = json.loads((run / "supervisor.json").read_text())["attempts"][-1]["number"]
        self.reason = ""
        self.folder = checkpoints_folder(run)
        self.step = max([step for step, _ in published_steps(self.folder)], default=0)
        self.parent = os.getppid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._asked)
        (run / f"pid-{self.attempt}-{self.world.rank}").write_text(str(os.getpid()))

    def _asked(self, number: int, frame: Any) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def work(self) -> int:
        """Wait for the others, as a rendezvous does, then step."""
        everyone = [self.run / f"pid-{self.attempt}-{rank}" for rank in range(self.world.size)]
        while not all(path.exists() for path in everyone) and not self.reason:
            time.sleep(0.005)
        while self.step < self.plan.get("steps", 8):
            if os.getppid() != self.parent:
                self.reason = "the launcher is gone"
            if self.reason:
                self._save()
                return self._leave(ExitCode.SAVED_REQUEUE, self.reason)
            if not self._next_step():
                continue
            if self.world.is_first:
                with (self.run / "events.jsonl").open("a") as file:
                    file.write(json.dumps({"event": "step", "step": self.step, "attempt": self.attempt}) + "\n")
            for fault in self.plan.get("faults", []):
                if fault.get("attempt") in (None, self.attempt):
                    if fault["rank"] == self.world.rank and fault["step"] == self.step:
                        self._fail(fault["do"])
            if self.step % self.plan.get("save_every", 4) == 0:
                self._save()
        return self._leave(ExitCode.COMPLETE, "complete")

    def _next_step(self) -> bool:
        """Rank 0 sets the pace, the others follow in its track, so that no rank ever reports a step that was not made."""
        pace = self.run / f"pace-{self.attempt}"
        time.sleep(self.plan.get("step_s", 0.02) if self.world.is_first else 0.005)
        if self.world.is_first:
            beside = pace.with_suffix(".new")
            beside.write_text(str(self.step + 1))
            beside.replace(pace)
        elif not pace.exists() or int(pace.read_text()) <= self.step:
            return False
        self.step += 1
        return True

    def _save(self) -> None:
        if self.world.is_first:
            step_folder(self.folder, self.step).mkdir(parents=True, exist_ok=True)

    def _leave(self, code: ExitCode, cause: str) -> int:
        write_exit(self.run, self.world, code=code, cause=cause, step=self.step)
        return int(code)

    def _fail(self, do: str | int) -> None:
        if isinstance(do, int):
            os._exit(self._leave(ExitCode(do), f"planned at step {self.step}"))
        if do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if do == "kill-launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        if do == "crash":
            os._exit(1)
        if do == "ignore-term":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        if do == "hang-with-word":
            self._leave(ExitCode.DEFECT, "hangs at exit")
            while True:
                time.sleep(1)


def main() -> int:
    role, run, path = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    plan = json.loads(path.read_text())
    if role == "supervise":
        return int(make_supervisor(run, path).run())
    return _launch(run, plan, path) if role == "launch" else _Rank(run, plan).work()


if __name__ == "__main__":
    sys.exit(main())
