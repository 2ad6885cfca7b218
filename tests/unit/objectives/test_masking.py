import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from dstrain.base.errors import ConfigError
from dstrain.base.protocols import Pieces
from dstrain.data.loader import RowSource
from dstrain.data.reader import ShardDataset
from dstrain.data.row_index import rows_per_block
from dstrain.data.shard_writer import ShardWriter
from dstrain.objectives.masking import Masking, MaskingConfig

VOCAB, MASK, SPECIAL = 1000, 4, (0, 1, 2, 3, 4)


def masking(*, seed=1, stream="train", special=SPECIAL, vocab=VOCAB, **settings):
    config = MaskingConfig(**settings)
    return Masking(config, seed=seed, stream=stream, mask_id=MASK, special_ids=special, vocab_size=vocab)


def pieces_of(n, *, uid=None, epoch=0, word=None, tokens=None, frame=None):
    rng = np.random.default_rng(n)
    return Pieces(
        tokens=rng.integers(5, VOCAB, n) if tokens is None else tokens,
        frame=np.zeros(n, dtype=np.bool_) if frame is None else frame,
        uid=np.arange(n) // 500 if uid is None else uid,
        position=np.arange(n) % 500,
        word=word,
        epoch=np.full(n, epoch, dtype=np.int64),
    )


def reordered(pieces, order):
    fields = {name: getattr(pieces, name) for name in ("tokens", "frame", "uid", "position", "word", "epoch")}
    return Pieces(**{name: None if value is None else value[order] for name, value in fields.items()})


# --- a pure function of the token's place --------------------------------------------------------------------------


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_tokens_fate_does_not_depend_on_its_neighbours(whole_word):
    pieces = pieces_of(4000, word=np.arange(4000) % 500 // 3 * 3)
    order = np.random.default_rng(0).permutation(4000)[:2500]
    apply = masking(whole_word=whole_word)
    whole, part = apply(pieces), apply(reordered(pieces, order))
    np.testing.assert_array_equal(part.tokens, whole.tokens[order])
    np.testing.assert_array_equal(np.isin(order, whole.targets), np.isin(np.arange(2500), part.targets))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(3)
    identity = {
        "tokenizer_sha256": "0" * 64, "vocab_size": VOCAB, "dtype": "uint16", "frame_prefix": [2], "frame_suffix": [3],
        "special_ids": list(SPECIAL),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("dataset")
    writer = ShardWriter(folder, identity=identity, block_tokens=1024, shard_bytes=1 << 20)
    for length in [200, 1, *rng.integers(2, 90, 60)]:
        writer.add(rng.integers(1, VOCAB, int(length)).astype(np.uint16))  # a few special ids stand in the text
    writer.finish(provenance={})
    return ShardDataset(folder)


WORDS = np.arange(VOCAB) % 3 == 0


def fates(dataset, sequence_length, *, rows_at_once, epoch=0, **settings):
    """(document, position) of every token -> what the model sees there, and whether it is scored."""
    source = RowSource(dataset, sequence_length=sequence_length, word_starts=WORDS, cache_bytes=1 << 20)
    counts = rows_per_block(
        dataset, num_blocks=len(dataset.blocks), fingerprint="", sequence_length=sequence_length, frame_length=2,
        may_write=False,
    )  # fmt: skip
    rows = [(epoch, block, row) for block in range(len(counts)) for row in range(int(counts[block]))]
    apply, found = masking(**settings), {}
    for first in range(0, len(rows), rows_at_once):
        pieces, _ = source.pieces(rows[first : first + rows_at_once])
        result = apply(pieces)
        scored = np.isin(np.arange(len(pieces.tokens)), result.targets)
        inner = ~pieces.frame
        places = zip(pieces.uid[inner].tolist(), pieces.position[inner].tolist())
        found.update(zip(places, zip(result.tokens[inner].tolist(), scored[inner].tolist())))
        assert not scored[pieces.frame].any()
        np.testing.assert_array_equal(result.tokens[pieces.frame], pieces.tokens[pieces.frame])
    assert len(found) == dataset.manifest.num_tokens
    return found


@pytest.mark.parametrize("whole_word", [False, True])
def test_packing_and_row_length_change_no_mask(whole_word, dataset):
    reference = fates(dataset, 64, rows_at_once=1, whole_word=whole_word)
    assert 0 < sum(scored for _, scored in reference.values()) < len(reference)
    for sequence_length, rows_at_once in ((64, 7), (16, 3), (17, 50), (256, 2)):
        assert fates(dataset, sequence_length, rows_at_once=rows_at_once, whole_word=whole_word) == reference


def test_words_are_chosen_whole_or_not_at_all_even_when_a_row_ends_inside_them(dataset):
    found = fates(dataset, 16, rows_at_once=4, whole_word=True)
    cut = 0
    for block in range(len(dataset.blocks)):
        raw = dataset.read(block)
        for number, document in enumerate(np.split(raw.tokens, raw.ends[:-1].astype(int))):
            starts = [0, *(p for p in range(1, len(document)) if WORDS[document[p]]), len(document)]
            for begin, end in itertools.pairwise(starts):
                ordinary = [p for p in range(begin, end) if document[p] not in SPECIAL]
                assert len({found[(block << 24) + number, p][1] for p in ordinary}) <= 1
                cut += begin // 14 != (end - 1) // 14 and len(ordinary) > 1
    assert cut > 5  # the case this test is about does occur


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"stream": "evaluation"}, {"epoch": 1}, {"uid": 10}, {"uid": 1 << 33}], ids=str
)
def test_seeds_streams_epochs_and_documents_have_unrelated_masks(change):
    n, rate = 20_000, 0.3
    moved = np.arange(n) // 500 + change.get("uid", 0)
    one = masking()(pieces_of(n))
    other = masking(seed=change.get("seed", 1), stream=change.get("stream", "train"))(
        pieces_of(n, epoch=change.get("epoch", 0), uid=moved)
    )
    agreement = np.mean(np.isin(np.arange(n), one.targets) == np.isin(np.arange(n), other.targets))
    expected = rate**2 + (1 - rate) ** 2
    assert abs(agreement - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_positions_of_a_document_have_unrelated_masks():
    chosen = np.isin(np.arange(40_000), masking(mask_rate=0.5)(pieces_of(40_000)).targets)
    for distance in (1, 2, 500):
        agreement = np.mean(chosen[distance:] == chosen[:-distance])
        assert abs(agreement - 0.5) < 4 * np.sqrt(0.25 / 40_000)


# --- rates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5])
def test_the_rate_is_what_was_asked_for(rate):
    n = 50_000
    found = len(masking(mask_rate=rate)(pieces_of(n)).targets)
    assert abs(found - n * rate) < 4 * np.sqrt(n * rate * (1 - rate))


def test_whole_words_are_chosen_at_the_rate_too():
    n, width = 50_000, 2
    pieces = pieces_of(n, word=np.arange(n) % 500 // width * width)
    targets = masking(mask_rate=0.3, whole_word=True)(pieces).targets
    assert abs(len(targets) - n * 0.3) < 4 * width * np.sqrt(n / width * 0.3 * 0.7)
    assert (np.bincount(targets // width) != 1).all()


def test_tokens_of_a_word_have_replacements_of_their_own():
    n = 30_000
    pieces = pieces_of(n, word=np.arange(n) % 500 // 2 * 2)
    result = masking(mask_share=0.5, random_share=0.5, whole_word=True)(pieces)
    hidden = result.tokens[result.targets] == MASK
    first, second = hidden[0::2], hidden[1::2]
    assert abs(np.mean(first == second) - 0.5) < 4 * np.sqrt(0.25 / len(first))


@pytest.mark.parametrize("shares", [(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_chosen_tokens_are_hidden_replaced_or_kept_as_asked(shares):
    mask_share, random_share = shares
    pieces = pieces_of(60_000)
    result = masking(mask_share=mask_share, random_share=random_share)(pieces)
    count = len(result.targets)
    seen = result.tokens[result.targets]
    hidden, kept = (seen == MASK).sum(), (seen == result.labels).sum()
    keep_share = 1 - mask_share - random_share + random_share / (VOCAB - len(SPECIAL))  # a draw may hit the same token
    for found, share in ((hidden, mask_share), (kept, keep_share)):
        assert abs(found - count * share) <= 4 * np.sqrt(count * share * (1 - share)) + 1e-6


def test_random_tokens_are_ordinary_and_equally_frequent():
    pieces = pieces_of(200_000, tokens=np.full(200_000, 7))
    special = (*SPECIAL, 500, 999)
    result = masking(mask_share=0.0, random_share=1.0, special=special)(pieces)
    counts = np.bincount(result.tokens[result.targets], minlength=VOCAB)
    assert counts[list(special)].sum() == 0
    ordinary = np.delete(counts, special)
    assert np.abs(ordinary - ordinary.mean()).max() < 5 * np.sqrt(ordinary.mean())


# --- what is never touched -----------------------------------------------------------------------------------------


def test_frames_and_special_tokens_are_never_chosen():
    n = 20_000
    tokens = np.random.default_rng(1).integers(0, 12, n)
    frame = np.random.default_rng(2).random(n) < 0.2
    result = masking(mask_rate=0.9)(pieces_of(n, tokens=tokens, frame=frame))
    assert len(result.targets) > 1000
    assert not frame[result.targets].any()
    assert (tokens[result.targets] > 4).all()


def test_what_is_not_chosen_is_shown_as_it_is_and_the_input_stays_untouched():
    pieces = pieces_of(5000)
    before = pieces.tokens.copy()
    result = masking()(pieces)
    np.testing.assert_array_equal(pieces.tokens, before)
    np.testing.assert_array_equal(np.delete(result.tokens, result.targets), np.delete(before, result.targets))
    np.testing.assert_array_equal(result.labels, before[result.targets])
    assert (np.diff(result.targets) > 0).all()


def test_an_empty_micro_batch_has_no_targets():
    result = masking()(pieces_of(0))
    assert (len(result.tokens), len(result.targets), len(result.labels)) == (0, 0, 0)


def test_whole_words_without_word_positions_fall_back_to_tokens():
    pieces = pieces_of(3000)
    np.testing.assert_array_equal(masking(whole_word=True)(pieces).tokens, masking()(pieces).tokens)


# --- settings ------------------------------------------------------------------------------------------------------


def test_known_masks_never_change():
    # A change here needs a new MASKING_VERSION: it would give every running job other masks.
    result = masking(seed=7, mask_share=0.4, random_share=0.4)(
        pieces_of(40, uid=np.full(40, 5 << 24), epoch=2, tokens=np.arange(100, 140))
    )
    assert result.targets.tolist() == [3, 4, 5, 6, 26, 29, 31, 33, 38]
    assert result.tokens[result.targets].tolist() == [870, 862, 105, 4, 126, 129, 4, 133, 4]


def test_the_description_tells_settings_apart():
    variants = [{}, {"mask_rate": 0.2}, {"mask_share": 0.7}, {"random_share": 0.2}, {"whole_word": True}]
    assert len({masking(**settings).description for settings in variants}) == len(variants)


def test_a_vocabulary_of_nothing_but_special_tokens_is_refused():
    with pytest.raises(ConfigError, match="all 5 ids of the vocabulary are special"):
        masking(vocab=5)


@pytest.mark.parametrize("settings", [{"mask_share": 0.8, "random_share": 0.3}, {"mask_rate": 0.0}, {"mask_rate": 1.0}])
def test_impossible_rates_are_refused(settings):
    with pytest.raises(ValidationError, match=r"add up to more than 1|greater than 0|less than 1"):
        MaskingConfig(**settings)
