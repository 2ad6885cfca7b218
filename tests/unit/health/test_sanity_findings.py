import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError, DstrainError, MachineError, PeerError, StorageError
from dstrain.health.sanity_findings import Finding, about, refuse, summary, worst

FINDINGS = st.lists(
    st.builds(
        Finding, st.sampled_from(["clock", "disk"]), st.sampled_from(["ok", "skipped", "warning", "failed"]), st.text(min_size=1),
        st.text(), code=st.sampled_from([76, 77, 78]),
    )
)  # fmt: skip


@given(FINDINGS)
def test_findings_survive_json_and_only_a_failed_one_ends_the_run(findings):
    assert [Finding.from_json(finding.to_json()) for finding in findings] == findings
    failed = [finding for finding in findings if finding.level == "failed"]
    assert (worst(findings) == "failed") == bool(failed)
    if not failed:
        return refuse(findings, rank=0)
    codes = set()
    for rank in range(2):
        with pytest.raises(DstrainError) as caught:
            refuse(findings, rank=rank)
        codes.add(int(caught.value.exit_code))
    assert len(codes) == 1, "every rank leaves with the same code"
    if any(finding.code == 78 for finding in failed):
        assert codes == {78}


def test_the_first_rank_of_each_host_at_fault_speaks_and_the_others_follow():
    finding = Finding("clock", "failed", "is off", "mend it", ranks=(2, 3, 5), hosts=("b", "b", "c"))
    for rank in range(6):
        with pytest.raises(MachineError if rank in (2, 5) else PeerError, match="clock: is off: mend it") as caught:
            refuse([finding], rank=rank)
        assert caught.value.exit_code == 77


@pytest.mark.parametrize(("code", "kind"), [(76, StorageError), (77, MachineError), (78, ConfigError)])
def test_a_fault_of_no_machine_is_rank_0s_to_say(code, kind):
    with pytest.raises(kind):
        refuse([Finding("x", "failed", "y", code=code)], rank=0)
    with pytest.raises(PeerError):
        refuse([Finding("x", "failed", "y", code=code)], rank=1)


def test_what_is_well_stands_in_one_line_and_the_rest_is_pointed_at():
    findings = [Finding("clock", "ok", "1 ms apart"), Finding("disk", "warning", "small")]
    assert summary(findings) == "clock 1 ms apart; see disk"
    assert summary([]) == "nothing was checked"


def test_long_lists_of_ranks_are_cut():
    hosts = [f"h{rank}" for rank in range(20)]
    assert about([3], hosts) == "rank 3 on h3"
    assert about(range(20), hosts).startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7, ... on h0,")
