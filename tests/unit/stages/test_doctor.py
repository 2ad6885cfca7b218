from dstrain.base.control import ControlPlane
from dstrain.base.errors import MachineError, StorageError
from dstrain.base.world import World
from dstrain.health.sanity_findings import Finding
from dstrain.stages.doctor import as_finding, examine, of_machines


class Several(ControlPlane):
    """Two ranks' words, as gathered on each of them."""

    def __init__(self, words):
        super().__init__(World())
        self.world, self._words = World(rank=0, size=2), words

    def gather_json(self, value):
        return self._words


def test_one_process_looks_at_its_own_machine_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    findings = examine(None, World(master_port=_port()), folder=tmp_path)
    checks = [finding.check for finding in findings]
    assert {"packages", "tools", "disk"} <= set(checks)
    assert "network" in checks, "of the machine itself"
    assert "versions" not in checks, "there is nobody to compare with"
    assert list(tmp_path.iterdir()) == []


def test_what_is_well_is_told_once_and_what_is_not_with_its_host():
    good, bad = Finding("limits", "ok", "fine"), Finding("clock", "warning", "is off", "mend it")
    words = [[[good.to_json()], "node1"], [[good.to_json(), bad.to_json()], "node2"]]
    assert of_machines(Several(words), []) == [
        good,
        Finding("clock", "warning", "node2: is off", "mend it", ranks=(1,), hosts=("node2",)),
    ]


def test_a_fault_that_ends_the_checks_is_their_last_line():
    assert as_finding(MachineError("no GPU")) == Finding("start", "failed", "no GPU", code=77)
    assert as_finding(StorageError("no room")).code == 76


def _port():
    from dstrain.base.world import free_port

    return free_port()
