import dataclasses

import numpy as np
import pytest

from dstrain.base.protocols import Corrupted
from dstrain.data.ledger import LEDGER_MODULUS, ledger_digest
from dstrain.data.order import mix64
from tests.support.packed_pieces import pieces_of

MASK = 4
DOCUMENTS = [np.arange(10 + i, 30 + 3 * i) for i in range(8)]


def corrupted(pieces, *, every=3):
    tokens = pieces.tokens.astype(np.int64)
    targets = np.flatnonzero((pieces.uid + pieces.position) % every == 0)
    targets = targets[~pieces.frame[targets]]
    labels = tokens[targets]
    tokens[targets[pieces.position[targets] % 2 == 0]] = MASK  # the others are shown as they are
    return Corrupted(tokens=tokens, targets=targets, labels=labels)


def digest(documents=DOCUMENTS, *, step=0, change=None, **place):
    pieces = pieces_of(documents, **place)
    result = corrupted(pieces)
    return ledger_digest(pieces, change(result) if change else result, step=step)


def test_digests_add_up_however_the_segments_are_divided():
    for cut in range(1, 8):
        parts = [
            digest(DOCUMENTS[a:b], uids=range(a, b), epochs=2, step=9) for a, b in ((0, cut), (cut, len(DOCUMENTS)))
        ]
        assert sum(parts) % LEDGER_MODULUS == digest(epochs=2, step=9)
    assert digest(DOCUMENTS[::-1], uids=range(7, -1, -1)) == digest()


def test_nothing_trained_on_is_zero_and_everything_stays_below_the_modulus():
    assert digest([]) == 0
    assert all(0 <= digest(step=step) < LEDGER_MODULUS for step in range(50))


@pytest.mark.parametrize("where", range(0, 200, 7))
def test_any_other_input_id_label_or_target_shows(where):
    def token(result):
        tokens = result.tokens.copy()
        tokens[where] += 1
        return dataclasses.replace(result, tokens=tokens)

    def label(result):
        labels = result.labels.copy()
        labels[where % len(labels)] += 1
        return dataclasses.replace(result, labels=labels)

    def dropped(result):  # also one whose input is its true id
        kept = np.arange(len(result.targets)) != where % len(result.targets)
        return dataclasses.replace(result, targets=result.targets[kept], labels=result.labels[kept])

    assert len({digest(), digest(change=token), digest(change=label), digest(change=dropped)}) == 4


def test_exchanged_tokens_show_wherever_they_are():
    def exchanged(first, second):
        def change(result):
            tokens = result.tokens.copy()
            tokens[[first, second]] = tokens[[second, first]]
            return dataclasses.replace(result, tokens=tokens)

        return change

    pieces = pieces_of(DOCUMENTS)
    shown = corrupted(pieces).tokens
    pairs = [(a, b) for a in range(0, 120, 9) for b in range(5, 200, 13) if shown[a] != shown[b]]
    found = [digest(change=exchanged(a, b)) for a, b in pairs]
    assert len(set(found)) == len({tuple(sorted(pair)) for pair in pairs})
    assert digest() not in found


@pytest.mark.parametrize(
    "change",
    [
        {"step": 1}, {"epochs": 1}, {"epochs": [0] * 7 + [1]}, {"starts": [0] * 7 + [1]}, {"uids": [0, 1, 2, 3, 4, 5, 6, 8]},
        {"uids": [1, 0, 2, 3, 4, 5, 6, 7]}, {"uids": [0, 1, 2, 3, 4, 5, 6, 7 - (1 << 63)]},
    ],
    ids=str,
)  # fmt: skip
def test_another_step_epoch_place_or_document_shows(change):
    assert digest(**change) != digest()


def test_a_repeated_or_missing_segment_shows():
    assert digest([*DOCUMENTS, DOCUMENTS[0]], uids=[*range(8), 0]) != digest()
    assert digest(DOCUMENTS[:7]) != digest()


def test_the_digest_is_the_sum_its_docstring_says():
    mask = (1 << 64) - 1
    golden = 0x9E3779B97F4A7C15

    def mix(value):
        return int(mix64(np.uint64(value & mask)))

    pieces = pieces_of(DOCUMENTS[:3], uids=[7, -5, 1 << 40], epochs=3, starts=[0, 100, 2])
    result = corrupted(pieces)
    total, begin = 0, 0
    labels = dict(zip(result.targets.tolist(), result.labels.tolist()))
    for length, uid, start in zip(pieces.lengths.tolist(), pieces.documents.tolist(), pieces.starts.tolist()):
        content = 0
        for place in range(length):
            content += (mix(place * golden + 0x243F6A8885A308D3) | 1) * int(result.tokens[begin + place])
            if begin + place in labels:
                content += (mix(place * golden + 0x13198A2E03707344) | 1) * (labels[begin + place] + 1)
        identity = mix((uid & mask) + 6 * golden) ^ mix((start << 32) + 3 + golden)
        total += mix(mix(identity) + content)
        begin += length
    assert ledger_digest(pieces, result, step=5) == (total & mask) % LEDGER_MODULUS


def test_known_digests_never_change():
    # A change here needs a new LEDGER_VERSION.
    known = [6078499017986052289, 7690296723011416266, 590279728364208503]
    assert [digest(step=step, epochs=step) for step in (0, 1, 1000)] == known
