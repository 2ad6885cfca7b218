"""After a loss of power at any moment of a save, the newest checkpoint that was promised is found, and it is whole.

The disk of `tests/support/crash_disk.py` forgets whatever was not made durable, in any combination. Kills say nothing
about this: the page cache survives a process (`test_save_protocol.py`). Many more states: `python benchmarks/soak.py`.
"""

from __future__ import annotations

import pytest

from tests.support.storage_trials import SCENARIOS, Bench, Scenario, power_losses

pytestmark = pytest.mark.fault

SEED = 20261125


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_the_power_is_lost_at_every_moment_of_a_save(scenario: Scenario, world_size: int, bench: Bench) -> None:
    tally = power_losses(bench, scenario, world_size, per_moment=60, seed=SEED)
    assert tally.failures == []
    assert tally.trials >= 1000, "a save has become shorter than anybody remembers: does the harness see it?"
    assert tally.points >= 60, "too few different states: is anything lost at all?"
