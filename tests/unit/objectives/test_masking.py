import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dstrain.base.errors import ConfigError
from dstrain.data.blocks import Block
from dstrain.data.packing import pack
from dstrain.data.rows import RowSource
from dstrain.data.tokenizer import Tokenizer, train_tokenizer
from dstrain.objectives.masking import Masking
from dstrain.objectives.masking_config import MaskingConfig
from tests.support.packed_pieces import pieces_of

VOCAB, MASK, SPECIAL = 1000, 4, (0, 1, 2, 3, 4)
WORDS = np.arange(VOCAB) % 3 == 0
KINDS = [
    {}, {"whole_word": True}, {"spans": True}, {"spans": True, "whole_word": True}, {"replace": "unit"},
    {"whole_word": True, "replace": "unit"}, {"spans": True, "replace": "unit"},
    {"spans": True, "whole_word": True, "replace": "unit"}, {"spans": True, "span_longest": 1},
    {"spans": True, "span_p": 0.05, "span_longest": 64, "mask_rate": 0.6},
]  # fmt: skip
kinds = pytest.mark.parametrize(
    "kind", KINDS, ids=lambda kind: "+".join(f"{k}={v}" for k, v in kind.items()) or "plain"
)


def masking(*, seed=1, stream="train", special=SPECIAL, vocab=VOCAB, **settings):
    config = MaskingConfig(**settings)
    return Masking(config, seed=seed, stream=stream, mask_id=MASK, special_ids=special, vocab_size=vocab)


def documents_of(n, *, seed=0, low=5, longest=500):
    """Documents of n tokens in all."""
    rng = np.random.default_rng(seed)
    sizes = []
    while sum(sizes) < n:
        sizes.append(min(int(rng.integers(1, longest + 1)), n - sum(sizes)))
    return [rng.integers(low, VOCAB, size) for size in sizes]


def scored(pieces, result):
    flags = np.zeros(len(pieces.tokens), dtype=bool)
    flags[result.targets] = True
    return flags


def content(pieces, result):
    """Of every content token: (document, position) -> (what the model sees, whether it is scored)."""
    flags, inner = scored(pieces, result), ~pieces.frame
    places = zip(pieces.uid[inner].tolist(), pieces.position[inner].tolist())
    return dict(zip(places, zip(result.tokens[inner].tolist(), flags[inner].tolist())))


# --- the law, in Python integers -----------------------------------------------------------------------------------


def philox(counter, key):
    c0, c1, c2, c3 = (c & 0xFFFFFFFF for c in counter)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def plain(apply, document, *, uid, epoch, step):
    """What the model sees of each token of a whole document, and whether it is scored: the docstring's law, word by word."""
    limits, c = apply.thresholds(step), apply.config

    def w(i):
        return philox(((i + 64) // 4, uid, uid >> 32, epoch), apply.key)[(i + 64) % 4]

    def v(i):
        return philox((i + 64 + 2**31, uid, uid >> 32, epoch), apply.key)

    found, word = [], -1
    for position, token in enumerate(document.tolist()):
        word += position == 0 or bool(WORDS[token])
        unit = word if c.whole_word else position
        back = next((k for k, limit in enumerate(limits.reach) if w(unit - k) < limit), None)
        if back is None or token in SPECIAL:
            found.append((token, False))
            continue
        if not (c.whole_word or c.spans):
            lot = w(unit)
        elif c.replace == "unit":
            lot = v(unit - back)[0]
        else:
            lot = v(position)[0]
        ordinary = [i for i in range(VOCAB) if i not in SPECIAL]
        drawn = ordinary[v(position)[1] * len(ordinary) >> 32]
        found.append((MASK if lot < limits.mask else drawn if lot < limits.random else token, True))
    return found


@kinds
def test_masks_are_those_of_the_law_in_plain_integers(kind):
    apply = masking(
        seed=3, **{"mask_share": 0.5, "random_share": 0.3, "mask_rate_final": 0.1, "mask_rate_steps": 10} | kind
    )
    documents = documents_of(700, seed=2, low=0, longest=150)
    rng = np.random.default_rng(5)
    uids = rng.integers(-(2**63), 2**63, len(documents))
    epochs = rng.integers(0, 2**32, len(documents))
    pieces = pieces_of(documents, uids=uids, epochs=epochs, word_starts=WORDS)
    found = content(pieces, apply(pieces, step=4))
    for document, uid, epoch in zip(documents, uids.tolist(), epochs.tolist()):
        expected = plain(apply, document, uid=uid, epoch=epoch, step=4)
        assert [found[uid, position] for position in range(len(document))] == expected


# --- a pure function of the token's place --------------------------------------------------------------------------


@kinds
@settings(max_examples=25)
@given(data=st.data())
def test_however_documents_are_cut_and_mixed_each_token_keeps_its_fate(kind, data):
    documents = documents_of(400, seed=7, low=0, longest=90)
    apply = masking(**kind)
    whole = pieces_of(documents, word_starts=WORDS)
    expected = content(whole, apply(whole))
    parts = []
    for number, document in enumerate(documents):
        cuts = data.draw(st.lists(st.integers(1, 89), max_size=4))
        bounds = sorted({0, len(document), *(cut for cut in cuts if cut < len(document))})
        parts += [(number, a, b) for a, b in itertools.pairwise(bounds)]
    parts = data.draw(st.permutations(parts))[: data.draw(st.integers(1, len(parts)))]
    pieces = pieces_of(
        [documents[n][a:b] for n, a, b in parts], uids=[n for n, _, _ in parts], starts=[a for _, a, _ in parts],
        before=[documents[n][:a] for n, a, _ in parts], word_starts=WORDS, head=data.draw(st.integers(0, 2)),
        tail=data.draw(st.integers(0, 2)),
    )  # fmt: skip
    found = content(pieces, apply(pieces))
    assert len(found) == sum(b - a for _, a, b in parts)
    assert found == {place: expected[place] for place in found}


class Memory:
    """A BlockDataset of blocks in memory."""

    def __init__(self, blocks):
        self.documents = blocks
        self.manifest = SimpleNamespace(frame_prefix=(2,), frame_suffix=(3,))

    def read(self, number):
        documents = self.documents[number]
        return Block(
            np.concatenate(documents).astype(np.uint16), np.cumsum([len(d) for d in documents]).astype(np.uint32)
        )


def fates(dataset, sequence_length, *, rows_at_once, words=WORDS, **settings):
    """(document, position) of every token -> what the model sees there, and whether it is scored."""
    source = RowSource(dataset, sequence_length=sequence_length, word_starts=words, cache_bytes=1 << 20)
    counts = [
        pack(dataset.read(block).ends, sequence_length=sequence_length, frame_length=2).num_rows
        for block in range(len(dataset.documents))
    ]
    rows = [(0, block, row) for block, count in enumerate(counts) for row in range(count)]
    apply, found = masking(**settings), {}
    for first in range(0, len(rows), rows_at_once):
        pieces, _ = source.pieces(rows[first : first + rows_at_once])
        result = apply(pieces)
        assert not scored(pieces, result)[pieces.frame].any()
        np.testing.assert_array_equal(result.tokens[pieces.frame], pieces.tokens[pieces.frame])
        found.update(content(pieces, result))
    assert len(found) == sum(len(d) for block in dataset.documents for d in block)
    return found


@kinds
def test_packing_row_length_and_world_size_change_no_mask(kind):
    dataset = Memory([documents_of(900, seed=seed, low=1, longest=200) for seed in range(3)])
    reference = fates(dataset, 64, rows_at_once=1, **kind)
    assert 0 < sum(hidden for _, hidden in reference.values()) < len(reference)
    for sequence_length, rows_at_once in ((64, 7), (16, 3), (17, 50), (256, 2)):
        assert fates(dataset, sequence_length, rows_at_once=rows_at_once, **kind) == reference


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"stream": "evaluation"}, {"epoch": 1}, {"uid": 10_000}, {"uid": 1 << 33}, {"uid": -(1 << 63)}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [{}, {"spans": True}], ids=str)
def test_seeds_streams_epochs_and_documents_have_unrelated_masks(change, kind):
    # What two ranks hold are other documents: unrelated masks agree in p² + (1-p)² of the places, equal ones in all.
    n, rate = 40_000, 0.3
    documents = documents_of(n)
    uids = np.arange(len(documents))
    one = pieces_of(documents, uids=uids)
    other = pieces_of(documents, uids=uids + change.get("uid", 0), epochs=change.get("epoch", 0))
    first = scored(one, masking(**kind)(one))
    apply = masking(seed=change.get("seed", 1), stream=change.get("stream", "train"), **kind)
    agreement = np.mean((first == scored(other, apply(other)))[~one.frame])
    expected = rate**2 + (1 - rate) ** 2
    spread = 1 if not kind else 4  # neighbours in a span are not independent: fewer free places than tokens
    assert abs(agreement - expected) < 4 * np.sqrt(spread * expected * (1 - expected) / n)


def test_positions_of_a_document_have_unrelated_masks():
    pieces = pieces_of([np.full(40_000, 9)])
    chosen = scored(pieces, masking(mask_rate=0.5)(pieces))[1:-1]
    for distance in (1, 2, 3, 4, 5, 500):
        agreement = np.mean(chosen[distance:] == chosen[:-distance])
        assert abs(agreement - 0.5) < 4 * np.sqrt(0.25 / 40_000)


# --- rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.5, 0.6])
def test_the_rate_is_what_was_asked_for(rate):
    n = 60_000
    found = len(masking(mask_rate=rate)(pieces_of(documents_of(n))).targets)
    assert abs(found - n * rate) < 4 * np.sqrt(n * rate * (1 - rate))


@pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.6])
@pytest.mark.parametrize("kind", [{"whole_word": True}, {"spans": True}, {"spans": True, "whole_word": True}], ids=str)
def test_the_rate_of_words_and_spans_is_what_was_asked_for_too(rate, kind):
    # Many short documents: the beginnings and ends of documents are as often covered as their middles.
    documents = documents_of(120_000, longest=24)
    pieces = pieces_of(documents, word_starts=WORDS)
    flags = scored(pieces, masking(mask_rate=rate, **kind)(pieces))
    sizes = pieces.lengths
    per_document = np.add.reduceat(flags, np.cumsum(sizes) - sizes, dtype=np.int64) - rate * (sizes - 2)
    assert abs(per_document.sum()) < 4 * np.sqrt((per_document**2).sum())  # documents are independent of each other
    inside = np.flatnonzero(pieces.offsets == 1)
    assert abs(flags[inside].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / len(inside))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_moves_the_rate_with_the_step_and_masks_only_shrink(shape):
    apply = masking(mask_rate=0.3, mask_rate_final=0.15, mask_rate_steps=100, mask_rate_shape=shape)
    pieces = pieces_of(documents_of(40_000))
    found = {step: set(apply(pieces, step=step).targets.tolist()) for step in (0, 50, 100, 10_000)}
    for step, rate in ((0, 0.3), (50, 0.225), (100, 0.15)):
        assert abs(len(found[step]) - 40_000 * rate) < 4 * np.sqrt(40_000 * rate * (1 - rate))
    assert found[0] > found[50] > found[100] == found[10_000]


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("kind", [{}, {"whole_word": True}, {"spans": True}], ids=str)
def test_chosen_tokens_are_hidden_replaced_or_kept_as_asked(shares, kind):
    mask_share, random_share = shares
    pieces = pieces_of(documents_of(60_000), word_starts=WORDS)
    result = masking(mask_share=mask_share, random_share=random_share, **kind)(pieces)
    count = len(result.targets)
    seen = result.tokens[result.targets]
    hidden, kept = (seen == MASK).sum(), (seen == result.labels).sum()
    keep_share = 1 - mask_share - random_share + random_share / (VOCAB - len(SPECIAL))  # a draw may hit the same token
    for found, share in ((hidden, mask_share), (kept, keep_share)):
        assert abs(found - count * share) <= 4 * np.sqrt(count * share * (1 - share)) + 1e-6


def test_tokens_of_a_word_have_lots_of_their_own_unless_the_unit_is_asked_for():
    pieces = pieces_of([np.tile([9, 10], 8000)], word_starts=WORDS)  # 9 begins a word, 10 goes on with it
    for replace, expected in (("token", 0.5), ("unit", 1.0)):
        result = masking(mask_share=0.5, random_share=0.5, whole_word=True, replace=replace)(pieces)
        hidden = result.tokens[result.targets] == MASK
        agreement = np.mean(hidden[0::2] == hidden[1::2])
        assert abs(agreement - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(hidden) * 2)


def test_random_tokens_are_ordinary_and_equally_frequent():
    pieces = pieces_of([np.full(400, 7) for _ in range(500)])
    special = (*SPECIAL, 500, 999)
    result = masking(mask_share=0.0, random_share=1.0, special=special)(pieces)
    counts = np.bincount(result.tokens[result.targets], minlength=VOCAB)
    assert counts[list(special)].sum() == 0
    ordinary = np.delete(counts, special)
    assert np.abs(ordinary - ordinary.mean()).max() < 5 * np.sqrt(ordinary.mean())


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spans", [False, True])
def test_words_are_chosen_whole_or_not_at_all_even_when_a_row_ends_inside_them(spans):
    dataset = Memory([documents_of(900, seed=seed, low=1, longest=200) for seed in range(3)])
    found = fates(dataset, 16, rows_at_once=4, whole_word=True, spans=spans)
    cut = 0
    for block, documents in enumerate(dataset.documents):
        for number, document in enumerate(documents):
            starts = [0, *(p for p in range(1, len(document)) if WORDS[document[p]]), len(document)]
            for begin, end in itertools.pairwise(starts):
                ordinary = [p for p in range(begin, end) if document[p] not in SPECIAL]
                assert len({found[(block << 24) + number, p][1] for p in ordinary}) <= 1
                cut += begin // 14 != (end - 1) // 14 and len(ordinary) > 1
    assert cut > 5  # the case this test is about does occur


@pytest.fixture(scope="module", params=["wordpiece", "bpe", "unigram"])
def trained(request, tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp(request.param) / "tok"
    sizes = {"wordpiece": 120, "bpe": 330, "unigram": 90}  # too few for whole words: most are cut
    train_tokenizer(texts, kind=request.param, vocab_size=sizes[request.param], out=folder, quiet=True)
    return Tokenizer.load(folder)


@pytest.mark.parametrize("spans", [False, True])
def test_the_words_of_real_tokenizers_are_whole_words_of_the_text(trained, texts, spans):
    documents = [ids.astype(np.int64) for ids in trained.encode_documents(texts)]
    words = trained.word_starts()
    apply = Masking(
        MaskingConfig(whole_word=True, spans=spans), seed=1, stream="t", mask_id=trained.mask_id,
        special_ids=trained.special_ids, vocab_size=trained.vocab_size,
    )  # fmt: skip
    found = content(p := pieces_of(documents, word_starts=words), apply(p))
    several = 0
    for number, (text, document) in enumerate(zip(texts, documents)):
        begins = [0, *(at for at in range(1, len(document)) if words[document[at]]), len(document)]
        pieces_per_word = [(a, b) for a, b in itertools.pairwise(begins)]
        assert [trained.decode(document[a:b]).strip() for a, b in pieces_per_word] == text.split()
        for begin, end in pieces_per_word:
            assert len({found[number, at][1] for at in range(begin, end)}) == 1
            several += end - begin > 1
    assert several > 100


# --- what is never touched -----------------------------------------------------------------------------------------


@kinds
def test_frames_and_special_tokens_are_never_chosen(kind):
    documents = documents_of(20_000, low=0)
    documents = [np.where(document < 300, document % 6, document) for document in documents]
    pieces = pieces_of(documents, word_starts=WORDS, head=2, tail=3)
    result = masking(**{"mask_rate": 0.9} | kind)(pieces)
    assert len(result.targets) > 1000
    assert not pieces.frame[result.targets].any()
    assert (pieces.tokens[result.targets] > 4).all()


@kinds
def test_what_is_not_chosen_is_shown_as_it_is_and_the_input_stays_untouched(kind):
    pieces = pieces_of(documents_of(5000), word_starts=WORDS)
    before = pieces.tokens.copy()
    result = masking(**kind)(pieces)
    np.testing.assert_array_equal(pieces.tokens, before)
    np.testing.assert_array_equal(np.delete(result.tokens, result.targets), np.delete(before, result.targets))
    np.testing.assert_array_equal(result.labels, before[result.targets])
    assert (np.diff(result.targets) > 0).all()
    assert {result.tokens.dtype, result.targets.dtype, result.labels.dtype} == {np.dtype(np.int64)}


@kinds
def test_a_micro_batch_may_be_empty_or_one_token(kind):
    for documents in ([], [np.array([9])], [np.array([1])]):
        result = masking(**kind)(pieces_of(documents, word_starts=WORDS))
        assert len(result.targets) == len(result.labels) <= len(documents)


def test_whole_words_without_word_positions_fall_back_to_tokens():
    pieces = pieces_of(documents_of(3000))
    chosen = masking(whole_word=True)(pieces).targets
    np.testing.assert_array_equal(chosen, masking()(pieces).targets)


# --- settings ------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parents[2] / "golden" / "masks.json"


def golden_case(kind):
    documents = [(np.arange(n) * 7919 + n) % (VOCAB - 5) + 5 for n in (1, 3, 40, 130)]
    uids = [5 << 24, (5 << 24) + 1, -7, 2**62 + 12345]
    pieces = pieces_of(documents, uids=uids, epochs=[0, 2, 2, 2**20 + 1], starts=[0, 0, 11, 0], word_starts=WORDS,
                       before=[documents[3][:0], documents[3][:0], documents[3][:11], documents[3][:0]])  # fmt: skip
    settings_ = {
        "mask_rate": 0.25,
        "mask_share": 0.4,
        "random_share": 0.4,
        "mask_rate_final": 0.5,
        "mask_rate_steps": 30,
    }
    apply = masking(seed=7, **settings_ | {"mask_rate_shape": "cosine"} | kind)
    result = apply(pieces, step=13)
    return {
        "kind": kind,
        "description": apply.description,
        "targets": result.targets.tolist(),
        "shown": result.tokens[result.targets].tolist(),
    }


def test_known_masks_never_change():
    # The same on every platform and library version. A change here needs a new MASKING_VERSION: it would give every
    # running job other masks. DSTRAIN_UPDATE_GOLDEN=1 writes them anew.
    found = [golden_case(kind) for kind in KINDS]
    if os.environ.get("DSTRAIN_UPDATE_GOLDEN") == "1":
        lines = ",\n".join(json.dumps(case) for case in found)
        GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_description_tells_settings_apart():
    schedule = {"mask_rate_final": 0.1, "mask_rate_steps": 10}
    variants = [
        *KINDS[:4], *KINDS[5:], {"mask_rate": 0.2}, {"mask_share": 0.7}, {"random_share": 0.2}, schedule,
        schedule | {"mask_rate_steps": 11}, schedule | {"mask_rate_final": 0.2}, schedule | {"mask_rate_shape": "cosine"},
        {"spans": True, "span_p": 0.3}, {"spans": True, "span_longest": 5},
    ]  # fmt: skip
    assert len({masking(**settings).description for settings in variants}) == len(variants)


def test_settings_that_change_nothing_leave_the_description_alone():
    plain_text = masking().description
    for idle in ({"replace": "unit"}, {"span_p": 0.5}, {"span_longest": 3}, {"mask_rate_shape": "cosine"}):
        assert masking(**idle).description == plain_text


def test_a_vocabulary_of_nothing_but_special_tokens_is_refused():
    with pytest.raises(ConfigError, match="all 5 ids of the vocabulary are special"):
        masking(vocab=5)


@pytest.mark.parametrize(
    "settings", [{"mask_share": 0.8, "random_share": 0.3}, {"mask_rate": 0.0}, {"mask_rate": 1.0}, {"span_p": 0.0},
                 {"span_longest": 65}, {"mask_rate_final": 0.1}, {"mask_rate_steps": 5}],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValidationError, match=r"add up to more than 1|greater than|less than|a schedule needs both"):
        MaskingConfig(**settings)
