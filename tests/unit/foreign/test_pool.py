from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest


@pytest.mark.fault
def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from dstrain.foreign.pool import start_pool
        def start(value):
            os.environ["STARTED"] = value
        def who():
            return os.getpid(), os.environ["STARTED"]
        if __name__ == "__main__":
            pool = start_pool(1, start, "with this")
            print(*pool.submit(who).result(), flush=True)
            time.sleep(600)
    """)
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, started = parent.stdout.readline().split(maxsplit=1)
        assert started.strip() == "with this"
        worker = psutil.Process(int(pid))
        assert worker.is_running()
        parent.kill()
    worker.wait(timeout=20)
    assert not worker.is_running()
