"""The waterfall is cumulative: each variant keeps what the one before has."""

from __future__ import annotations

import pytest

from dstrain.planner.variants import variants


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
