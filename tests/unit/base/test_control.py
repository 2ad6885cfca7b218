import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ConfigError, DataError
from dstrain.base.protocols import Interrupted
from dstrain.base.world import World


@pytest.fixture
def alone():
    return ControlPlane(World())


def test_sums_of_one_rank_are_its_own_numbers(alone):
    assert alone.sum([3, 2**62]) == [3, 2**62]
    assert alone.sum_floats([0.1, 0.2]) == [0.1, 0.2]


@pytest.mark.parametrize("value", [True, False])
def test_all_true_is_the_only_ranks_answer(alone, value):
    assert alone.all_true(value) is value


def test_one_rank_gathers_itself(alone):
    assert alone.gather_json({"a": [1]}) == [{"a": [1]}]
    assert alone.from_first({"a": 1}) == {"a": 1}


def test_together_returns_the_result(alone):
    assert alone.together(lambda: [1, 2]) == [1, 2]


def test_together_raises_the_own_fault_itself(alone):
    fault = DataError("shard 3 is damaged")

    def fail():
        raise fault

    with pytest.raises(DataError) as caught:
        alone.together(fail)
    assert caught.value is fault


def test_together_does_not_dress_up_defects(alone):
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 // 0)


def test_together_leaves_when_the_action_was_left_because_of_a_stop(alone):
    def leave():
        raise Interrupted("asked to stop")

    with pytest.raises(Interrupted, match="asked to stop"):
        alone.together(leave)


def test_a_world_of_one_meets_nowhere(alone):
    assert alone.store is None


def test_a_second_try_after_a_fault_is_a_fresh_one(alone):
    def fail():
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        alone.together(fail)
    assert alone.together(lambda: "fine") == "fine"
    alone.barrier()
