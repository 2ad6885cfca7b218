"""The model section of a run."""

from __future__ import annotations

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.models.config import ModelConfig


def read(data: dict[str, object]) -> ModelConfig:
    return validate(ModelConfig, data, source="run.yaml")


def test_a_model_needs_an_architecture_or_an_origin() -> None:
    with pytest.raises(ConfigError, match=r"give config\.model_type .* or init_from"):
        read({})
    with pytest.raises(ConfigError, match=r"config\.model_type is missing: for example bert"):
        read({"config": {"hidden_size": 8}})


def test_an_origin_may_be_changed_without_naming_its_type() -> None:
    assert read({"init_from": "runs/a", "config": {"hidden_dropout_prob": 0.0}}).config == {"hidden_dropout_prob": 0.0}
    assert read({"init_from": "runs/a"}).config == {}


def test_attention_is_one_of_three() -> None:
    assert read({"config": {"model_type": "bert"}}).attention == "auto"
    with pytest.raises(ConfigError, match=r"attention: .*'flash'"):
        read({"config": {"model_type": "bert"}, "attention": "flash"})


def test_the_padded_vocabulary_is_at_least_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="pad_vocab_to"):
        read({"config": {"model_type": "bert"}, "pad_vocab_to": 0})
