"""Interface names: one name, and nothing that NCCL reads as an operator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.base.rank_settings import RankSettings, is_interface_name


@pytest.mark.parametrize("name", ["lo", "eth0", "ib0", "enp1s0f0", "bond0.100", "eth0:1", "ens_1-a"])
def test_names_that_linux_gives_are_taken(name: str) -> None:
    assert RankSettings(interface=name).interface == name


@pytest.mark.parametrize(
    "name", ["", "eth0,eth1", "^lo", "=eth0", "eth0 ", "-x", "a\nb", "$(id)", "e" * 16, "..", "ethé"]
)
def test_others_are_refused_with_their_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"interface: .*no interface name"):
        validate(RankSettings, {"interface": name}, source="run.yaml")


@given(st.text(max_size=20))
def test_what_is_accepted_is_one_word_without_operators(name: str) -> None:
    if is_interface_name(name):
        assert 0 < len(name) <= 15
        assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.:_-")
        assert name[0].isalnum()
