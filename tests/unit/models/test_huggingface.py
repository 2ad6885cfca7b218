"""Every family against plain transformers: same logits, no leak between documents, learns, and refuses what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from dstrain.base.control import ControlPlane
from dstrain.base.errors import ConfigError, StorageError
from dstrain.models.config import ModelConfig
from dstrain.models.encoders import SequenceClassifier
from dstrain.models.huggingface import (
    MaskedLanguageModel,
    accepted_inputs,
    architecture_of,
    build_classifier,
    build_masked_lm,
    facts,
    initialise,
    load_folder_weights,
    plain_logits,
    read_architecture,
    reload_logits,
    save_folder,
)
from dstrain.objectives.mlm import MlmObjective
from dstrain.optim.config import OptimizerConfig
from dstrain.train.ds_config import EngineConfig
from dstrain.train.engine import Engine
from tests.support.tiny_models import (
    FAMILIES,
    LENGTHS,
    PADDED,
    SPECIAL,
    UNPADDED,
    VOCABULARY,
    documents,
    packed,
    plain_answer,
    step_data,
    tiny_model,
)

families = pytest.mark.parametrize("family", list(FAMILIES))
STARTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]


@torch.no_grad()
def logits(model: MaskedLanguageModel, texts: list[Tensor], targets: Tensor | None = None) -> Tensor:
    return model.eval()(packed(texts, targets=targets))


@pytest.mark.parametrize("family", list(UNPADDED))
def test_families_of_the_attention_interface_run_unpadded(family: str) -> None:
    model = tiny_model(family)
    assert model.attention == "unpadded"
    assert "self-check" in model.attention_reason


@pytest.mark.parametrize("family", list(PADDED))
def test_other_families_are_padded_and_say_why(family: str) -> None:
    model = tiny_model(family)
    assert model.attention == "padded"
    assert "attention interface" in model.attention_reason
    with pytest.raises(ConfigError, match=r"model\.attention: unpadded is not possible here: .*use auto or padded"):
        tiny_model(family, attention="unpadded")


@families
def test_logits_at_the_targets_are_those_of_plain_transformers_for_each_document_alone(family: str) -> None:
    model, texts = tiny_model(family), documents()
    targets = torch.arange(sum(LENGTHS))[::3]
    expected = plain_answer(model, texts)
    assert expected.abs().max() > 0.05, "logits near zero would agree with anything"
    found = logits(model, texts, targets)
    assert found.shape == (len(targets), 64)
    torch.testing.assert_close(found, expected[targets], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(UNPADDED))
def test_padded_rows_give_the_same_logits_as_the_flat_row(family: str) -> None:
    texts = documents()
    flat, rows = (logits(tiny_model(family, attention=a), texts) for a in ("unpadded", "padded"))
    torch.testing.assert_close(flat, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("local_attention", [2, 4, 10, 30])
def test_modernberts_window_is_plain_transformers_window(local_attention: int) -> None:
    """Also where the window is shorter than every document: an off-by-one would show."""
    model, texts = tiny_model("modernbert", local_attention=local_attention), documents()
    torch.testing.assert_close(logits(model, texts), plain_answer(model, texts), rtol=0, atol=1e-5)


def test_modernberts_window_matters() -> None:
    texts = documents()
    narrow, wide = (logits(tiny_model("modernbert", local_attention=w), texts) for w in (2, 30))
    assert (narrow - wide).abs().max() > 1e-3


@families
def test_changing_one_document_never_changes_another(family: str) -> None:
    model, texts = tiny_model(family), documents()
    before = logits(model, texts)
    for changed in (0, 2, 5):
        other = list(texts)
        other[changed] = (texts[changed] - 4) % (VOCABULARY - 5) + 5
        after = logits(model, other)
        for i, (start, length) in enumerate(zip(STARTS, LENGTHS)):
            difference = (before[start : start + length] - after[start : start + length]).abs().max()
            assert (difference > 1e-4) if i == changed else (difference <= 1e-6), (changed, i)


@families
def test_a_documents_gradient_stays_in_the_document(family: str) -> None:
    model, texts = tiny_model(family).eval(), documents((7, 7, 5))
    embedding = model.model.get_input_embeddings()
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    embedding.register_forward_hook(keep)
    model(packed(texts, targets=torch.tensor([8]))).square().sum().backward()
    reached = seen[0].grad.abs().sum(-1).reshape(-1) if model.attention == "unpadded" else seen[0].grad.abs().sum(-1)
    inside = reached[7:14] if model.attention == "unpadded" else reached[1]
    assert (inside > 0).any()
    assert float(reached.sum()) == pytest.approx(float(inside.sum()), rel=1e-6)


@families
def test_positions_restart_so_that_permuted_documents_give_permuted_logits(family: str) -> None:
    model, texts = tiny_model(family), documents((11, 11, 11))
    before = logits(model, texts).split(11)
    after = logits(model, [texts[i] for i in (2, 0, 1)]).split(11)
    for place, original in enumerate((2, 0, 1)):
        torch.testing.assert_close(after[place], before[original], rtol=0, atol=1e-6)
    assert not torch.allclose(before[0], before[1], atol=1e-3)


@families
def test_a_few_steps_through_the_engine_learn_a_fixed_batch(family: str, control: ControlPlane) -> None:
    engine = Engine(
        tiny_model(family, initializer_range=0.02), MlmObjective(), config=EngineConfig(zero_stage=1, bucket_elements=10_000),
        optimizer=OptimizerConfig(), control=control, device="cpu", precision="fp32", micro_batch=6, accumulation=1, seed=0,
    )  # fmt: skip
    data = step_data([packed(documents(), targets=torch.arange(0, sum(LENGTHS), 4))])
    losses = [engine.train_step(data, step=i, learning_rate=1e-2).loss for i in range(8)]
    assert losses[0] == pytest.approx(4.16, abs=0.15), "log 64: random weights know nothing"
    assert losses[-1] < losses[0] - 0.5


def test_no_hidden_state_is_kept_between_forwards() -> None:
    """The hook must not cut the rows of a forward that is not ours (export compares plain logits)."""
    model, texts = tiny_model("bert").eval(), documents((6, 4))
    few = logits(model, texts, torch.tensor([1, 7]))
    model.model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = plain_logits(model, texts[0])
    assert whole.shape == (6, 64)
    torch.testing.assert_close(whole[1], few[0], rtol=0, atol=1e-5)


# --- sizes -----------------------------------------------------------------------------------------------------------


@families
def test_the_vocabulary_is_rounded_up_and_the_tokenizer_names_the_special_tokens(family: str) -> None:
    model = tiny_model(family)
    assert facts(model).vocab_size == model.model.get_input_embeddings().weight.shape[0] == 64
    assert model.model.config.pad_token_id == 1
    assert facts(model).num_parameters == sum(p.numel() for p in model.parameters())
    assert facts(model).hidden_size == 32
    assert facts(model).intermediate_size == 64
    assert facts(model).num_layers == (3 if family == "modernbert" else 2)


@pytest.mark.parametrize(("multiple", "size"), [(1, 61), (8, 64), (64, 64), (100, 100)])
def test_padding_of_the_vocabulary_follows_the_configuration(multiple: int, size: int) -> None:
    config = ModelConfig(config={"model_type": "bert", **FAMILIES["bert"]}, pad_vocab_to=multiple)
    assert facts(build_masked_lm(config, vocab_size=VOCABULARY, special=SPECIAL)).vocab_size == size


def test_positions_that_are_a_table_limit_the_length_and_rotary_ones_do_not() -> None:
    assert facts(tiny_model("bert")).max_positions == 66
    assert facts(tiny_model("roberta")).max_positions == 64, "two rows lie before the first position"
    assert facts(tiny_model("modernbert")).max_positions is None


def test_roberta_takes_a_document_as_long_as_its_last_position() -> None:
    model, texts = tiny_model("roberta"), documents((64,))
    torch.testing.assert_close(logits(model, texts), plain_answer(model, texts), rtol=0, atol=1e-5)


def test_token_types_are_left_out_where_the_model_has_none() -> None:
    assert "token_type_ids" in accepted_inputs(tiny_model("bert"))
    assert "token_type_ids" not in accepted_inputs(tiny_model("distilbert"))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bart2"}, r"model\.config\.model_type: 'bart2' is not known"),
        ({"hiden_size": 32}, r"model\.config\.hiden_size: not a field .* Did you mean hidden_size"),
        ({"global_attn_every_n_layers": 3}, r"model\.config\.global_attn_every_n_layers: not a field of transformers' bert"),
        ({"vocab_size": 60}, r"model\.config\.vocab_size: 60 is smaller than the tokenizer's 61"),
        ({"num_attention_heads": 5}, r"model\.config: transformers .*bert"),
        ({"hidden_act": "nonsense"}, r"model\.config: transformers .*bert"),
        ({"num_hidden_layers": "two"}, r"model\.config: transformers .*bert"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    config = ModelConfig(config={"model_type": "bert", **FAMILIES["bert"], **fields})
    with pytest.raises(ConfigError, match=message):
        build_masked_lm(config, vocab_size=VOCABULARY, special=SPECIAL)


def test_a_type_without_a_masked_language_head_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.config\.model_type: 'vit' has no ForMaskedLM class"):
        build_masked_lm(ModelConfig(config={"model_type": "vit"}), vocab_size=VOCABULARY, special=SPECIAL)


def test_fields_that_came_with_a_model_are_not_held_against_the_user() -> None:
    """Published configurations carry names that transformers no longer lists."""
    came = {"model_type": "bert", **FAMILIES["bert"], "gradient_checkpointing": False, "an_old_name": 3}
    config = ModelConfig(init_from="somewhere", config={"hidden_dropout_prob": 0.25})
    model = build_masked_lm(config, vocab_size=VOCABULARY, special=SPECIAL, architecture=came)
    assert model.model.config.hidden_dropout_prob == 0.25
    assert model.model.config.hidden_size == 32


# --- weights from elsewhere ------------------------------------------------------------------------------------------


def classifier(num_labels: int = 3, attention: Any = "auto", **fields: Any) -> SequenceClassifier:
    torch.manual_seed(1)
    config = ModelConfig(config={"model_type": "bert", **FAMILIES["bert"], **fields}, attention=attention)
    labels = tuple(f"label {i}" for i in range(num_labels))
    return build_classifier(
        config, num_labels=num_labels, labels=labels, regression=False, vocab_size=VOCABULARY, special=SPECIAL
    )


def named(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def test_an_encoder_with_a_new_head_keeps_the_encoder_and_reports_the_head() -> None:
    pretrained, tuned = tiny_model("bert", seed=3), classifier()
    head = named(tuned)["classifier.weight"]
    fresh = initialise(tuned, named(pretrained), source="elsewhere")
    assert sorted(fresh) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    new, old = named(tuned), named(pretrained)
    assert all(torch.equal(new[name], old[name]) for name in new if name in old)
    assert torch.equal(new["classifier.weight"], head)


@pytest.mark.parametrize("prefixed", [True, False])
def test_names_are_found_with_and_without_the_base_models_prefix(prefixed: bool) -> None:
    source, model = tiny_model("bert", seed=3), tiny_model("bert", seed=4)
    weights = named(source)
    if not prefixed:
        weights = {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    assert initialise(model, weights, source="elsewhere") == []
    assert all(torch.equal(p, named(source)[name]) for name, p in named(model).items())


def test_a_weight_of_another_shape_or_none_names_itself() -> None:
    model = tiny_model("bert")
    wider = named(tiny_model("bert", intermediate_size=96))
    with pytest.raises(
        ConfigError,
        match=r"init_from: elsewhere: bert\.encoder\.layer\.0\.intermediate\.dense\.weight has shape \(96, 32\)",
    ):
        initialise(model, wider, source="elsewhere")
    short = {name: tensor for name, tensor in named(model).items() if "layer.1.output.dense.weight" not in name}
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense\.weight is missing"):
        initialise(model, short, source="elsewhere")


def test_a_head_of_another_width_is_refused_not_kept_random() -> None:
    with pytest.raises(ConfigError, match=r"classifier\.weight has shape \(5, 32\), the model needs \(3, 32\)"):
        initialise(classifier(3), named(classifier(5)), source="elsewhere")


def test_a_full_disk_is_no_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(StorageError, match=r"cannot be written: .*No space left on device.*Make room there"):
        save_folder(tiny_model("bert", attention="padded"), tmp_path)


def test_a_saved_folder_is_read_back_with_its_weights_and_sizes(tmp_path: Path) -> None:
    model = tiny_model("modernbert", attention="padded")
    save_folder(model, tmp_path)
    came = read_architecture(tmp_path)
    again = build_masked_lm(ModelConfig(init_from="x"), vocab_size=VOCABULARY, special=SPECIAL, architecture=came)
    assert initialise(again, load_folder_weights(tmp_path), source="x") == []
    text = documents((12,))
    torch.testing.assert_close(logits(again, text), logits(model, text), rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(reload_logits(tmp_path, text[0]), logits(model, text), rtol=0, atol=1e-5)
    assert architecture_of(again)["layer_types"] == architecture_of(model)["layer_types"]


def test_pickled_weights_are_refused_unopened(tmp_path: Path) -> None:
    """The file would touch a witness if anybody unpickled it."""
    witness = tmp_path / "witness"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (witness,)

    torch.save({"weight": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors weights; pickled \.bin files are not loaded"):
        load_folder_weights(tmp_path)
    assert not witness.exists()


def test_code_that_a_configuration_names_never_runs(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (tmp_path / "own_code.py").write_text(f"from pathlib import Path\nPath({str(witness)!r}).touch()\n")
    auto = {"AutoConfig": "own_code.Config", "AutoModelForMaskedLM": "own_code.Model"}
    settings = {"model_type": "bert", **FAMILIES["bert"], "auto_map": auto, "architectures": ["Model"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    came = read_architecture(tmp_path)
    assert "auto_map" not in came
    model = build_masked_lm(ModelConfig(init_from="x"), vocab_size=VOCABULARY, special=SPECIAL, architecture=came)
    assert type(model.model).__name__ == "BertForMaskedLM"
    assert not witness.exists()


@pytest.mark.parametrize("content", [None, "not json", '{"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}'])
def test_a_folder_without_a_known_architecture_is_a_users_fault(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        build_masked_lm(
            ModelConfig(init_from="x"), vocab_size=VOCABULARY, special=SPECIAL, architecture=read_architecture(tmp_path)
        )


# --- classifiers -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_classifier_scores_the_wanted_segments_and_sees_no_padding() -> None:
    model, texts = classifier().eval(), documents((9, 5, 2))
    together = model(packed(texts, targets=torch.tensor([2, 0])))
    apart = torch.cat([model(packed([texts[i]], targets=torch.tensor([0]))) for i in (2, 0)])
    assert together.shape == (2, 3)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-6)
    assert model.model.config.id2label == {0: "label 0", 1: "label 1", 2: "label 2"}


@torch.no_grad()
def test_a_classifier_uses_token_types_where_the_model_has_them() -> None:
    model, batch = classifier().eval(), packed(documents((6,)), targets=torch.tensor([0]))
    typed = type(batch)(**{**vars(batch), "token_types": torch.tensor([0, 0, 0, 1, 1, 1])})
    plain = classifier(attention="padded").eval()
    plain.load_state_dict(model.state_dict())
    expected = plain.model(input_ids=batch.tokens[None], token_type_ids=typed.token_types[None]).logits
    torch.testing.assert_close(model(typed), expected, rtol=0, atol=1e-6)
    assert (model(batch) - model(typed)).abs().max() > 1e-5


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_classifier_without_padding_equals_the_padded_one(family: str, pooling: str) -> None:
    """Logits and gradients; families whose pooler or attention wants rows say so and are fed rows."""
    fields = {"model_type": family, **FAMILIES[family]} | (
        {"classifier_pooling": pooling} if family == "modernbert" else {}
    )
    built = []
    for attention in ("auto", "padded"):
        config = ModelConfig(config=fields, attention=attention)  # type: ignore[arg-type]
        torch.manual_seed(3)
        built.append(
            build_classifier(
                config, num_labels=3, labels=("a", "b", "c"), regression=False, vocab_size=VOCABULARY, special=SPECIAL
            )
        )
    packed_model, padded_model = (model.eval() for model in built)
    assert packed_model.attention == ("padded" if family in ("albert", "deberta-v2") else "unpadded")
    batch = packed(documents((9, 5, 5, 2)), targets=torch.tensor([3, 0, 1, 2]))
    logits = [model(batch) for model in (packed_model, padded_model)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    for value in logits:
        value.square().sum().backward()
    other = dict(padded_model.named_parameters())
    for name, parameter in packed_model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, other[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_regressor_has_one_output() -> None:
    config = ModelConfig(config={"model_type": "bert", **FAMILIES["bert"]})
    model = build_classifier(config, num_labels=1, labels=(), regression=True, vocab_size=VOCABULARY, special=SPECIAL)
    assert model.model.config.problem_type == "regression"
    assert model.eval()(packed(documents((6, 2)), targets=torch.tensor([0, 1]))).shape == (2, 1)


def test_types_without_a_classification_head_are_named() -> None:
    config = ModelConfig(config={"model_type": "vit"})
    with pytest.raises(ConfigError, match="'vit' has no ForSequenceClassification class"):
        build_classifier(
            config, num_labels=2, labels=("a", "b"), regression=False, vocab_size=VOCABULARY, special=SPECIAL
        )
