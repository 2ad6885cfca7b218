"""Which variables a job inherits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.launcher.forwarding import check_forward, forwarded, is_forwarded


@pytest.mark.parametrize(
    "name",
    ["PATH", "HOME", "LD_LIBRARY_PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "SLURM_JOB_ID", "AWS_ACCESS_KEY_ID", "HF_HOME",
     "https_proxy", "HTTPS_PROXY", "OMP_NUM_THREADS", "PYTHONPATH", "SSH_AUTH_SOCK", "SBATCH_QOS", "MODULEPATH", "TMPDIR"],
)  # fmt: skip
def test_what_programs_under_a_run_read_is_forwarded(name: str) -> None:
    assert is_forwarded(name)


@pytest.mark.parametrize(
    "name", ["EDITOR", "GITHUB_TOKEN", "DATABASE_PASSWORD", "PS1", "BASH_ENV", "BASH_FUNC_x%%", "ENV", "path"]
)
def test_the_rest_of_a_shell_is_not(name: str) -> None:
    assert not is_forwarded(name)
    assert forwarded({name: "1"}) == {}
    assert forwarded({name: "1"}, [name]) == {name: "1"}


@pytest.mark.parametrize("name", ["", "A=B", "1A", "a b", "A\n", "-x", "$(id)", "é"])
def test_forward_takes_names_only(name: str) -> None:
    with pytest.raises(ConfigError, match="--forward"):
        check_forward(name)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=3), max_size=8))
def test_nothing_is_changed_or_made_up(environment: dict[str, str]) -> None:
    kept = forwarded(environment)
    assert kept.items() <= environment.items()
    assert forwarded(kept) == kept
