from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dstrain.base.errors import DataError
from dstrain.data.tokenizer import Tokenizer, train_tokenizer

KINDS = {"wordpiece": 200, "bpe": 300, "unigram": 80}


@pytest.fixture(scope="module", params=sorted(KINDS))
def trained(request, tmp_path_factory, texts) -> Tokenizer:
    out = tmp_path_factory.mktemp("trained") / request.param
    train_tokenizer(texts, kind=request.param, vocab_size=KINDS[request.param], out=out, quiet=True)
    return Tokenizer.load(out)


def roberta(folder: Path, *, mask: str | None = "<mask>") -> Path:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *alphabet])}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"cls_token": "<s>", "sep_token": "</s>"} | ({"mask_token": mask} if mask else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(str(folder))
    return folder


def test_a_trained_folder_loads_in_transformers_with_every_special_token_named(trained):
    fast = AutoTokenizer.from_pretrained(str(trained.folder), local_files_only=True)
    assert [fast.pad_token, fast.unk_token, fast.cls_token, fast.sep_token, fast.mask_token] == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    assert fast.model_max_length == 512
    ids = fast("a quick fox", "a dog")["input_ids"]
    assert ids[0] == trained.cls_id
    assert ids.count(trained.sep_id) == 2


def test_documents_carry_no_special_tokens_and_read_back_as_their_text(trained, texts):
    for text, ids in zip(texts, trained.encode_documents(texts)):
        assert ids.dtype == np.uint16
        assert not set(ids.tolist()) & set(trained.special_ids)
        assert trained.decode(ids).split() == text.split()


def test_a_special_token_written_in_the_text_stays_text(trained):
    text = "the [MASK] fox [SEP] jumps [PAD] over [CLS]"
    ids = set(trained.encode_documents([text])[0].tolist())
    assert not ids & {trained.mask_id, trained.sep_id, trained.pad_id, trained.cls_id}


def test_framed_document_equals_what_transformers_makes_of_it(trained, texts):
    fast = AutoTokenizer.from_pretrained(str(trained.folder))
    document = trained.encode_documents(texts[:1])[0].tolist()
    assert [*trained.frame_prefix, *document, *trained.frame_suffix] == fast(texts[0])["input_ids"]


def test_word_starts_count_the_words_of_a_text(trained):
    starts = trained.word_starts()
    assert starts.shape == (trained.vocab_size,)
    ids = trained.encode_documents(["seven wise owls watch"])[0]
    assert int(starts[ids][1:].sum()) == 3
    assert starts[list(trained.special_ids)].all()


def test_pairs_are_cut_from_the_longer_text_and_typed(trained):
    second = trained.encode_documents(["owls"])[0].tolist()
    length = 2 * len(second) + 3
    example = trained.encode_examples(["the quick brown fox jumps over a dog"], ["owls"], max_length=length)[0]
    assert len(example.tokens) == length
    assert example.tokens[0] == trained.cls_id
    assert example.tokens.tolist().count(trained.sep_id) == 2
    assert example.token_types[0] == 0
    assert example.token_types[-1] == 1
    assert example.tokens[-1 - len(second) : -1].tolist() == second


def test_max_length_without_room_for_text_is_refused(trained):
    with pytest.raises(DataError, match="no room"):
        trained.encode_examples(["a"], max_length=2)


def test_training_in_another_process_gives_the_same_bytes(tmp_path, texts):
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json,sys,pathlib;from dstrain.data.tokenizer import train_tokenizer;"
        "root=pathlib.Path(sys.argv[1]);texts=json.loads((root/'texts.json').read_text());"
        "[train_tokenizer(texts,kind=k,vocab_size=int(n),out=root/'there'/k,quiet=True)"
        " for k,n in (a.split('=') for a in sys.argv[2:])]"
    )
    sizes = {kind: KINDS[kind] for kind in ("wordpiece", "bpe")}
    args = [str(tmp_path), *(f"{kind}={size}" for kind, size in sizes.items())]
    subprocess.run([sys.executable, "-c", script, *args], check=True, capture_output=True)
    for kind, size in sizes.items():
        train_tokenizer(texts, kind=kind, vocab_size=size, out=tmp_path / "here" / kind, quiet=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "here" / kind / name).read_bytes() == (tmp_path / "there" / kind / name).read_bytes()


def test_copy_keeps_bytes_and_fingerprint(trained, tmp_path):
    trained.copy_to(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.fingerprint == trained.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (trained.folder / name).read_bytes()


def test_fingerprint_ignores_layout_and_truncation_but_not_the_vocabulary(trained, tmp_path):
    trained.copy_to(tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(dict(reversed(definition.items()))))
    same = Tokenizer.load(tmp_path)
    assert same.fingerprint == trained.fingerprint
    assert len(same.encode_documents(["the quick brown fox jumps over a lazy dog"])[0]) > 7
    definition["added_tokens"].append({**definition["added_tokens"][-1], "id": trained.vocab_size, "content": "[NEW]"})
    path.write_text(json.dumps(definition))
    assert Tokenizer.load(tmp_path).fingerprint != trained.fingerprint


def test_a_roberta_tokenizer_frames_with_its_own_tokens(tmp_path):
    tokenizer = Tokenizer.load(roberta(tmp_path / "roberta"))
    assert (tokenizer.frame_prefix, tokenizer.frame_suffix) == ((0,), (2,))
    assert (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id) == (0, 2, 4, 1)
    starts = tokenizer.word_starts()
    ids = tokenizer.encode_documents(["ab cd, é"])[0]
    assert [bool(starts[i]) for i in ids] == [False, False, True, False, False, True, True, False, False]


def test_a_tokenizer_without_mask_token_is_refused_with_the_fix(tmp_path):
    with pytest.raises(DataError, match=r"no mask token.*mask_token.*dstrain tokenizer train"):
        Tokenizer.load(roberta(tmp_path / "nomask", mask=None))


def test_missing_and_broken_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.*dstrain tokenizer train"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tokenizer.json is missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_existing_output_is_kept_unless_overwritten(tmp_path, texts):
    out = tmp_path / "tok"
    train_tokenizer(texts, kind="wordpiece", vocab_size=150, out=out, quiet=True)
    before = (out / "tokenizer.json").read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        train_tokenizer(texts, kind="bpe", vocab_size=300, out=out, quiet=True)
    assert (out / "tokenizer.json").read_bytes() == before
    train_tokenizer(texts, kind="bpe", vocab_size=300, out=out, overwrite=True, quiet=True)
    assert (out / "tokenizer.json").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["tok"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_empty_corpus_is_refused_and_leaves_nothing(kind, tmp_path):
    with pytest.raises(DataError, match="corpus is empty"):
        train_tokenizer(iter([""]), kind=kind, vocab_size=300, out=tmp_path / "tok", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_fault_while_reading_reaches_the_caller(kind, tmp_path):
    def broken():
        yield "some text to begin with"
        raise DataError("line 2 is bad")

    with pytest.raises(DataError, match="line 2 is bad"):
        train_tokenizer(broken(), kind=kind, vocab_size=300, out=tmp_path / "tok", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_vocabulary_below_the_alphabet_is_refused_with_the_least_size(kind, tmp_path, texts):
    with pytest.raises(DataError, match=r"use at least \d+"):
        train_tokenizer(texts, kind=kind, vocab_size=16, out=tmp_path / "tok", quiet=True)
