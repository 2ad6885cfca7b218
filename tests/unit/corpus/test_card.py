from __future__ import annotations

import json
import random

import pytest
from huggingface_hub import DatasetCard
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus.card import (
    CARD_NAME,
    STATS_NAME,
    CardCounts,
    CardFacts,
    card_text,
    size_category,
    stats,
    write_card,
)
from dstrain.corpus.sources import Source

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.sampled_from(["a.jsonl", "/x/b.jsonl", "hf:own/name"]), st.integers(0, 1 << 20)),
        st.tuples(st.just("drop"), st.sampled_from(["empty", "too_short", "lid:wrong"]), st.integers(1, 5)),
        st.tuples(st.just("group"), st.integers(1, 1000), st.booleans()),
        st.tuples(st.just("keep"), st.sampled_from(["train", "validation"]), st.integers(1, 1 << 20)),
    ),
    max_size=30,
)


def count(events: list[tuple]) -> CardCounts:
    counts = CardCounts()
    for kind, what, amount in events:
        if kind == "read":
            counts.read(Source(what, None), size_bytes=amount)
        elif kind == "drop":
            counts.drop(what, count=amount)
        elif kind == "group":
            counts.group(what, dropped=amount)
        else:
            counts.keep(what, tokens=amount, characters=amount * 4, size_bytes=amount * 5)
    return counts


def text_of(counts: CardCounts) -> str:
    return json.dumps(counts.to_json())


@given(EVENTS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_any_division_among_tasks_and_any_order_gives_the_same_bytes(events, num_tasks, shuffler: random.Random):
    parts = [count(events[task::num_tasks]) for task in range(num_tasks)]
    shuffler.shuffle(parts)
    total = CardCounts()
    for part in parts:
        total.merge(CardCounts.from_json(json.loads(text_of(part)), place="task"))
    assert text_of(total) == text_of(count(events))


def test_histograms_have_bins_of_powers_of_two():
    counts = CardCounts()
    for tokens in (1, 2, 3, 4, 7, 8):
        counts.keep("train", tokens=tokens, characters=4 * tokens, size_bytes=4 * tokens)
    for occurrences in (1, 1, 2, 3, 4):
        counts.group(occurrences)
    assert counts.token_lengths == {1: 1, 2: 2, 3: 2, 4: 1}
    assert counts.copies == {0: 2, 1: 2, 2: 1}
    assert (counts.duplicates, counts.dropped["duplicate"]) == (6, 6)
    assert counts.characters_per_token == {8: 6}


def test_duplicates_that_are_kept_are_counted_but_not_dropped():
    counts = CardCounts()
    counts.group(3, dropped=False)
    assert (counts.duplicates, counts.dropped.total()) == (2, 0)


@pytest.mark.parametrize("data", [None, [], {}, {"version": 2}, {**CardCounts().to_json(), "tokens": {"train": -1}}])
def test_what_is_no_task_count_is_refused_by_place(data):
    with pytest.raises(DataError, match="task-7: not the counts of a build task"):
        CardCounts.from_json(data, place="task-7")


FACTS = CardFacts(
    name="my | <b>corpus</b>",
    tokenizer={"vocab_size": 32768, "kind": "WordPiece"},
    settings={"seed": 0, "corpus": {"split": "file"}},
    splits={
        "train": {"shards": 2, "blocks": 5, "bytes": 1234567},
        "validation": {"shards": 1, "blocks": 1, "bytes": 9},
    },
)


def filled() -> CardCounts:
    counts = CardCounts()
    for index in range(1500):
        counts.read(Source(f"/somewhere/part-{index % 25:02d}.jsonl", None), size_bytes=400 + index % 25)
        counts.group(1 + (index % 10 == 0))
        counts.keep("validation" if index % 100 == 0 else "train", tokens=100, characters=420, size_bytes=430)
    counts.drop("too_short", count=77)
    return counts


def test_the_hub_reads_the_card(tmp_path):
    write_card(tmp_path, filled(), FACTS)
    card = DatasetCard.load(tmp_path / CARD_NAME)
    data = card.data.to_dict()
    assert data["task_categories"] == ["fill-mask"]
    assert data["size_categories"] == ["1K<n<10K"]
    files = data["configs"][0]["data_files"]
    assert files == [{"split": "train", "path": "train/*.tar"}, {"split": "validation", "path": "validation/*.tar"}]


def test_the_card_shows_the_numbers_and_escapes_names():
    text = card_text(filled(), FACTS)
    assert "1,500 documents, 150,000 tokens" in text
    assert "| train | 1,485 | 148,500 | 5 | 2 | 1,234,567 |" in text
    assert "| too\\_short" not in text
    assert "| duplicate | 150 | 10.00% |" in text
    assert "| 64–127 | 1,500 | ██████████████████████████████ |" in text
    assert "| characters per token | 4.20 |" in text
    assert "and 5 more, in `stats.json`" in text
    assert "# my \\| &lt;b>corpus&lt;/b>" in text
    assert "/somewhere" not in text


def test_stats_hold_every_count_and_equal_counts_give_equal_bytes(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_card(tmp_path / name, filled(), FACTS)
    for file in (CARD_NAME, STATS_NAME):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    found = json.loads((tmp_path / "one" / STATS_NAME).read_text())
    assert found["totals"]["characters_per_token"] == 4.2
    assert text_of(CardCounts.from_json(found["counts"], place="stats")) == text_of(filled())


def test_an_empty_build_has_a_card_too():
    assert "0 documents, 0 tokens" in card_text(CardCounts(), FACTS)
    assert stats(CardCounts(), FACTS)["totals"]["characters_per_token"] is None


@pytest.mark.parametrize(
    ("documents", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6 - 1, "100K<n<1M"), (10**9, "1B<n<10B"), (10**12, "n>1T")],
)
def test_size_categories_are_the_hubs(documents, category):
    assert size_category(documents) == category


@pytest.mark.parametrize(("dropped", "fate"), [(True, "1,506 of them dropped"), (False, "none dropped")])
def test_the_card_has_a_histogram_of_duplicates(dropped: bool, fate: str):
    counts = CardCounts()
    for occurrences, texts in ((1, 40), (2, 3), (3, 2), (1500, 1)):
        for _ in range(texts):
            counts.group(occurrences, dropped=dropped)
    counts.keep("train", tokens=1, characters=4, size_bytes=4)
    section = card_text(counts, FACTS).split("## Duplicates\n\n")[1].split("\n\n## ")[0]
    assert section.startswith(f"46 distinct texts and 1,506 copies of them, {fate}.")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in section.splitlines() if line.startswith("| ")]
    assert rows[:2] == [["times a text occurs", "count"], ["---", "---"]]
    assert rows[2:4] == [["1", "40"], ["2–3", "5"]]
    assert rows[-1] == ["1,024–2,047", "1"]
    assert stats(counts, FACTS)["counts"]["copies"] == {"0": 40, "1": 5, "10": 1}
