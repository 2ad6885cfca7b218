"""The waterfall is cumulative: each variant keeps what the one before has."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.config import validate
from dstrain.planner.bench import variant_config
from dstrain.planner.variants import learning_variants, variants
from dstrain.stages.config import PretrainConfig
from tests.support.runs import pretrain_settings


@pytest.mark.parametrize(
    ("model_type", "compiles", "names"),
    [
        ("bert", False, ["padded", "unpadded", "sparse", "inside", "twice"]),
        ("bert", True, ["padded", "unpadded", "sparse", "inside", "compiled", "twice"]),
        ("modernbert", True, ["padded", "unpadded", "sparse", "inside", "dstrain's encoder", "compiled", "twice"]),
    ],
)
def test_there_is_one_saver_more_at_a_time(model_type: str, compiles: bool, names: list[str]) -> None:
    found = variants(model_type=model_type, compiles=compiles, micro_batch=4)
    assert len(found) == len(names)
    assert all(word in variant.name for word, variant in zip(names, found))


def test_the_first_has_no_saver_and_the_last_has_all() -> None:
    found = variants(model_type="modernbert", compiles=True, micro_batch=4)
    assert (found[0].sections["model"]["attention"], found[0].head) == ("padded", "every-token")
    assert found[0].sections["engine"]["compile"] == "off"
    last = found[-1]
    assert last.sections == {
        "engine": {"compile": "blocks"},
        "model": {"attention": "auto", "kind": "dstrain-encoder"},
        "train": {"micro_batch": 8},
    }
    assert last.head == "inside"


def test_a_variant_is_not_changed_by_those_after_it() -> None:
    found = variants(model_type="modernbert", compiles=True, micro_batch=4)
    assert [v.sections["model"]["kind"] for v in found] == ["huggingface"] * 4 + ["dstrain-encoder"] * 3
    assert ["train" in v.sections for v in found] == [False] * 6 + [True]


def test_switches_that_change_the_learning_stand_each_by_itself_on_the_best() -> None:
    best = variants(model_type="bert", compiles=False, micro_batch=4)[-1]
    found = learning_variants(best)
    assert all(variant.changes_learning for variant in found)
    for variant in found:
        added = {name: section for name, section in variant.sections.items() if name not in best.sections}
        assert len(added) == 1
        assert {name: variant.sections[name] for name in best.sections} == best.sections


def test_their_keys_are_those_of_the_configuration(tmp_path: Path) -> None:
    settings = pretrain_settings(tmp_path / "shards", tmp_path / "run")
    config = validate(PretrainConfig, settings, source="test")
    for variant in learning_variants(variants(model_type="bert", compiles=False, micro_batch=4)[3]):
        variant_config(config, variant, tmp_path)
