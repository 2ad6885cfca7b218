import pytest

from dstrain.base import errors
from dstrain.base.errors import DstrainError, ExitCode, PeerError

CODES = {
    errors.ConfigError: 78,
    errors.DataError: 78,
    errors.DamagedBlockError: 78,
    errors.CheckpointError: 78,
    errors.NothingToResumeError: 81,
    errors.RunInUseError: 80,
    errors.MachineError: 77,
    errors.NoProgressError: 79,
    errors.StorageError: 76,
    errors.PeerGoneError: 76,
}


@pytest.mark.parametrize(("kind", "code"), CODES.items(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_each_fault_leaves_with_its_own_code(kind, code):
    fault = kind("what, where, mend")
    assert isinstance(fault, DstrainError)
    assert fault.exit_code == code
    assert str(fault) == "what, where, mend"


def test_every_fault_of_the_tree_has_a_code_in_this_table():
    classes = {v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, DstrainError)}
    assert classes - {DstrainError, PeerError} == set(CODES)


def test_a_peer_error_takes_the_code_of_the_rank_that_failed():
    fault = PeerError("rank 3: no room", exit_code=76)
    assert fault.exit_code is ExitCode.RETRY_HERE
    assert PeerError("rank 0: x", exit_code=80).exit_code is ExitCode.RUN_IN_USE


def test_a_peer_error_refuses_a_code_that_does_not_exist():
    with pytest.raises(ValueError, match="99"):
        PeerError("rank 3: what?", exit_code=99)


def test_exit_codes_keep_clear_of_the_shell_and_of_each_other():
    own = [int(code) for code in ExitCode if code > 2]
    assert len(set(ExitCode)) == len(ExitCode.__members__)
    assert all(75 <= code < 126 for code in own)


def test_the_page_for_people_says_what_the_code_says(repository):
    page = (repository / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert f"| {int(code)} | {code.name} |" in page
