from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.input_ids import ids_at, token_decoder
from dstrain.corpus.sources import CorpusConfig
from dstrain.data.tokenizer import Tokenizer


def test_text_comes_back_without_special_tokens(tokenizer_folder, texts):
    tokenizer = Tokenizer.load(tokenizer_folder)
    decoder = token_decoder(CorpusConfig(input_tokenizer=str(tokenizer_folder)), place="c")
    ids = tokenizer.encode_documents(texts[:1])[0]
    framed = np.concatenate([tokenizer.frame_prefix, ids, tokenizer.frame_suffix])
    assert decoder.text(framed, place="c") == texts[0]
    assert decoder.text(ids[:0], place="c") == ""


def test_a_tokenizer_without_a_mask_token_will_do(tmp_path, tokenizer_folder):
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tok")
    (folder / "tokenizer_config.json").unlink()
    assert token_decoder(CorpusConfig(input_tokenizer=str(folder)), place="c").vocab_size > 5


@pytest.mark.parametrize("wrong", [-1, 70_000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer_folder, wrong):
    decoder = token_decoder(CorpusConfig(input_tokenizer=str(tokenizer_folder)), place="c")
    with pytest.raises(DataError, match=f"c:7: token id {wrong} is outside"):
        decoder.text(np.array([5, wrong]), place="c:7")


def test_a_definition_that_cannot_be_read_is_named_and_a_mended_one_is_read_again(tmp_path, tokenizer_folder):
    config = CorpusConfig(input_tokenizer=str(tmp_path))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "none"}}))
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer definition"):
        token_decoder(config, place="c")
    shutil.copy(tokenizer_folder / "tokenizer.json", path)
    assert token_decoder(config, place="c").vocab_size > 5


def test_ids_are_read_at_their_place_or_the_end_is_named():
    stream = io.BytesIO(np.arange(10, dtype="<u2").tobytes())
    assert ids_at(stream, 4, 3, np.dtype("<u2"), place="c:1").tolist() == [2, 3, 4]
    with pytest.raises(DataError, match="c:1: the file ends at byte 20"):
        ids_at(stream, 16, 3, np.dtype("<u2"), place="c:1")
