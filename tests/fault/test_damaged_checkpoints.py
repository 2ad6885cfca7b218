"""A damaged checkpoint is never loaded; the newest good one is, unaided, whatever else lies around.

Bits, ends, swaps, mixtures, losses, forgeries, links and wrong kinds of file (`tests/support/checkpoint_damage.py`), on the
newest checkpoint and often on more; clocks, pointers and strangers beside them. Ten thousand: `python benchmarks/soak.py`.
"""

from __future__ import annotations

import os

import pytest

from dstrain.checkpoint.layout import step_folder
from dstrain.checkpoint.reader import newest_valid
from tests.support import checkpoint_damage
from tests.support.damage_trials import STEPS, WORLD, damages
from tests.support.storage_trials import Bench

pytestmark = pytest.mark.fault

SEED = 20261125


def test_the_newest_good_checkpoint_is_found_among_damaged_ones(bench: Bench) -> None:
    tally = damages(bench, 600, seed=SEED)
    assert tally.failures == []
    assert tally.points >= 150, "too few different combinations of damage"


@pytest.mark.parametrize("way", sorted(set(checkpoint_damage.WAYS), key=lambda w: w.__name__), ids=lambda w: w.__name__)
def test_every_way_of_damage_is_met_on_every_checkpoint(way: object, bench: Bench) -> None:
    assert damages(bench, 12, seed=SEED + 1, ways=(way,)).failures == []


def test_a_checkpoint_cut_at_every_byte_of_its_manifest_is_never_loaded(bench: Bench) -> None:
    run = bench.fresh()
    for step in STEPS[:2]:
        bench.save(run, step, WORLD, keep_last=10)
    manifest = step_folder(run, STEPS[1]) / "manifest.json"
    whole = manifest.read_bytes()
    for size in range(len(whole.rstrip()) - 1, -1, -1):
        os.truncate(manifest, size)
        found = newest_valid(run)
        assert found.checkpoint is not None, f"cut at byte {size}"
        assert found.checkpoint.manifest.step == STEPS[0], f"cut at byte {size}"
