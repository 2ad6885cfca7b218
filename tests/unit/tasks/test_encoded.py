import dataclasses

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.base.protocols import IGNORED_LABEL
from dstrain.data.tokenizer import Tokenizer, train_tokenizer
from dstrain.tasks.encoded import encode, longest_first, make_micro_batch
from dstrain.tasks.examples import Examples

TEXTS = ("the cat sat on the mat", "a dog", "the dog sat on a cat and the cat sat on the dog")
PAIRS = ("a dog", "the cat sat on the mat", "on the mat")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_tokenizer(iter(TEXTS), kind="wordpiece", vocab_size=80, out=folder, min_frequency=1, quiet=True)
    return Tokenizer.load(folder)


def examples(*, pairs=None, labels=(0, 1, 0), has_labels=True):
    return Examples(
        texts=TEXTS, pairs=pairs, labels=np.array(labels, dtype=np.int64), rows=(2, 3, 4), has_labels=has_labels
    )


def test_examples_are_framed_and_cut(tokenizer):
    encoded = encode(examples(), tokenizer, max_length=8)
    assert len(encoded) == 3
    assert encoded.lengths.max() == 8
    starts = encoded.ends - encoded.lengths
    assert (encoded.tokens[starts] == tokenizer.cls_id).all()
    assert (encoded.tokens[encoded.ends - 1] == tokenizer.sep_id).all()


def test_the_second_text_of_a_pair_has_another_type(tokenizer):
    encoded = encode(examples(pairs=PAIRS), tokenizer, max_length=64)
    first = slice(0, int(encoded.ends[0]))
    separators = np.flatnonzero(encoded.tokens[first] == tokenizer.sep_id)
    assert len(separators) == 2
    assert encoded.token_types[first].tolist() == [0] * (separators[0] + 1) + [1] * (separators[1] - separators[0])


def test_no_room_for_text_is_an_error(tokenizer):
    with pytest.raises(DataError, match="max_length"):
        encode(examples(pairs=PAIRS), tokenizer, max_length=3)


def test_a_micro_batch_holds_the_examples_asked_for(tokenizer):
    encoded = encode(examples(), tokenizer, max_length=64)
    order = longest_first(encoded, np.array([0, 1, 2]))
    assert order.tolist() == [2, 0, 1]
    batch = make_micro_batch(encoded, order)
    texts = [tokenizer.decode(part.tolist()) for part in batch.tokens.split(list(batch.lengths))]
    assert [text.removeprefix("[CLS] ").removesuffix(" [SEP]") for text in texts] == [TEXTS[i] for i in order]
    assert batch.labels.tolist() == [0, 0, 1]


def test_examples_without_labels_have_nothing_to_score(tokenizer):
    unlabelled = examples(labels=(IGNORED_LABEL,) * 3, has_labels=False)
    batch = make_micro_batch(encode(unlabelled, tokenizer, max_length=64), [2, 0])
    assert batch.num_targets == 0
    assert batch.num_tokens == sum(batch.lengths)


def test_the_fingerprint_changes_with_ids_types_labels_and_boundaries(tokenizer):
    encoded = encode(examples(), tokenizer, max_length=64)
    same = encode(examples(), tokenizer, max_length=64)
    tokens, types, ends = encoded.tokens.copy(), encoded.token_types.copy(), encoded.ends.copy()
    tokens[1] += 1
    types[1] += 1
    ends[0] += 1
    changed = [
        dataclasses.replace(encoded, tokens=tokens),
        dataclasses.replace(encoded, token_types=types),
        dataclasses.replace(encoded, ends=ends),
        encode(examples(labels=(1, 1, 0)), tokenizer, max_length=64),
        encode(examples(), tokenizer, max_length=8),
    ]
    assert same.fingerprint == encoded.fingerprint
    assert len({encoded.fingerprint, *(c.fingerprint for c in changed)}) == 1 + len(changed)
