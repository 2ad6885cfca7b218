"""dstrain's encoder is ModernBERT: the same names, the same logits, the same gradients, one document at a time or packed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import architecture_of, build_classifier, build_masked_lm, facts
from dstrain.objectives.linear_cross_entropy import LinearCrossEntropy, score_logits
from tests.support.tiny_models import SPECIAL, VOCABULARY, documents, packed, tiny_encoder, tiny_model


def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    return tiny_encoder(seed=4), tiny_model("modernbert", seed=4)


def test_names_and_initial_weights_are_those_of_modernbert() -> None:
    ours, theirs = pair()
    one, other = ours.model.state_dict(), theirs.model.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [n for n, _ in ours.model.named_parameters()] == [n for n, _ in theirs.model.named_parameters()]
    ignored = {"_attn_implementation", "attn_implementation"}
    one, other = architecture_of(ours), architecture_of(theirs)
    assert {k: v for k, v in one.items() if k not in ignored} == {k: v for k, v in other.items() if k not in ignored}


def test_logits_and_gradients_are_those_of_transformers() -> None:
    ours, theirs = pair()
    batch = packed(documents())
    one, other = ours(batch), theirs(batch)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for logits in (one, other):
        logits.square().sum().backward()
    for (name, left), right in zip(ours.model.named_parameters(), theirs.model.parameters()):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_packed_documents_answer_as_they_do_alone() -> None:
    ours = tiny_encoder()
    texts = documents()
    together = ours(packed(texts))
    apart = torch.cat([ours(packed([text])) for text in texts])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_the_head_scores_as_its_logits_would() -> None:
    ours = tiny_encoder()
    batch = packed(documents())
    loss, hits = ours(batch, head_loss=partial(LinearCrossEntropy(), labels=batch.labels))
    expected, expected_hits = score_logits(ours(batch), batch.labels)
    torch.testing.assert_close(loss, expected)
    assert hits == expected_hits


def test_its_weights_make_a_native_folder(tmp_path: Path) -> None:
    """What an export does: the checkpoint's tensors, under their names, in transformers' own class."""
    ours = tiny_encoder(seed=9)
    native = tiny_model("modernbert", seed=1).model
    native.load_state_dict(ours.model.state_dict())
    native.set_attn_implementation("sdpa")
    native.save_pretrained(tmp_path)
    again = type(native).from_pretrained(tmp_path).eval()
    [text] = documents((19,))
    with torch.no_grad():
        found: Tensor = again(input_ids=text[None]).logits[0]
        torch.testing.assert_close(found, ours(packed([text])), rtol=0, atol=1e-5)


def test_dropout_is_for_training_only_and_seeded() -> None:
    ours = tiny_encoder(embedding_dropout=0.1, mlp_dropout=0.1, attention_dropout=0.1)
    batch = packed(documents())

    def answer() -> Tensor:
        torch.manual_seed(0)
        return ours(batch)

    trained = answer()
    assert torch.equal(trained, answer())
    ours.eval()
    calm = answer()
    assert not torch.equal(calm, trained)
    torch.testing.assert_close(calm, tiny_encoder()(batch))


def test_its_facts_are_modernberts() -> None:
    ours, theirs = pair()
    one, other = facts(ours), facts(theirs)
    assert (one.num_parameters, one.num_layers, one.gated) == (other.num_parameters, other.num_layers, True)
    assert one.max_positions is None
    assert one.attention == "unpadded"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": {"model_type": "bert"}}, "has the architecture modernbert, not 'bert'"),
        ({"attention": "padded"}, "always unpadded"),
    ],
)
def test_what_it_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ModelConfig, {"kind": "dstrain-encoder", **fields}, source="run.yaml")


def test_weights_of_another_architecture_are_refused() -> None:
    config = ModelConfig(kind="dstrain-encoder", init_from="x")
    with pytest.raises(ConfigError, match="not 'bert'"):
        build_masked_lm(config, vocab_size=VOCABULARY, special=SPECIAL, architecture={"model_type": "bert"})


def test_it_does_not_fine_tune_itself() -> None:
    with pytest.raises(ConfigError, match="kind: huggingface"):
        build_classifier(
            ModelConfig(kind="dstrain-encoder"),
            num_labels=2,
            labels=(),
            regression=False,
            vocab_size=9,
            special=SPECIAL,
        )
