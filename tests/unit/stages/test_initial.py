"""Where weights come from: a run, a checkpoint or a Hugging Face folder, told apart by what lies in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dstrain.base.errors import CheckpointError, ConfigError
from dstrain.data.tokenizer import Tokenizer, train_tokenizer
from dstrain.models.huggingface import save_folder
from dstrain.stages.initial import best_checkpoint, find_origin, grow_from_smaller
from tests.support.tiny_checkpoints import fragments_of, manifest_of, save, state_of, writer_of
from tests.support.tiny_models import tiny_encoder, tiny_model


def save_with_best(folder: Path, step: int, *, best: int, **fields: Any) -> None:
    manifest = manifest_of(step, state={"step": step, "best_step": best}, **fields)
    writer_of(folder).save(fragments_of(state_of(step)), manifest, config_yaml="", tokenizer=None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 4, 6 and 8; 4 was the best."""
    for step in (4, 6, 8):
        save_with_best(tmp_path / "checkpoints", step, best=4)
    return tmp_path


def test_a_run_is_known_by_its_best_checkpoint(run: Path) -> None:
    assert best_checkpoint(run).manifest.step == 4


def test_a_step_asked_for_wins(run: Path) -> None:
    assert best_checkpoint(run, step=6).manifest.step == 6
    with pytest.raises(ConfigError, match="no checkpoint of step 7"):
        best_checkpoint(run, step=7)


def test_a_best_that_is_gone_or_damaged_gives_the_newest(run: Path) -> None:
    (run / "checkpoints/step-00000004/manifest.json").write_text("garbage")
    assert best_checkpoint(run).manifest.step == 8


def test_without_a_metric_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints", 4)
    damaged = save(tmp_path / "checkpoints", 8)
    (damaged / "config.yaml").unlink()
    assert best_checkpoint(tmp_path).manifest.step == 4


def test_no_whole_checkpoint_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no valid checkpoint; none was saved there yet: train first"):
        best_checkpoint(tmp_path)
    (save(tmp_path / "checkpoints", 4) / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no valid checkpoint \(.*config\.yaml: missing"):
        best_checkpoint(tmp_path)


def test_a_run_folder_and_one_of_its_checkpoints_are_origins(run: Path, tmp_path: Path) -> None:
    from_run, from_checkpoint = find_origin(str(run)), find_origin(str(run / "checkpoints/step-00000008"))
    assert from_run is not None
    assert from_checkpoint is not None
    for origin, step in ((from_run, 4), (from_checkpoint, 8)):
        assert origin.architecture == {"model_type": "bert"}
        assert origin.tokenizer_folder is None
        assert torch.equal(origin.weights()["encoder.weight"].reshape(-1), state_of(step)["encoder.weight", "fp32"])


def test_labels_and_library_versions_are_not_part_of_an_architecture(tmp_path: Path) -> None:
    architecture = {"model_type": "bert", "hidden_size": 8, "id2label": {"0": "a"}, "num_labels": 1, "transformers_version": "5",
                    "architectures": ["X"], "problem_type": "regression"}  # fmt: skip
    save_with_best(tmp_path / "checkpoints", 4, best=4, architecture=architecture)
    origin = find_origin(str(tmp_path))
    assert origin is not None
    assert origin.architecture == {"model_type": "bert", "hidden_size": 8}


def test_a_hugging_face_folder_is_an_origin_with_its_tokenizer_if_it_has_one(tmp_path: Path) -> None:
    model = tiny_model("bert", attention="padded")
    save_folder(model, tmp_path)
    origin = find_origin(str(tmp_path))
    assert origin is not None
    assert origin.tokenizer_folder is None
    assert origin.architecture["hidden_size"] == 32
    stored = dict(model.model.named_parameters())
    weights = origin.weights()
    assert all(torch.equal(weights[name], stored[name]) for name in weights if name in stored)
    (tmp_path / "tokenizer.json").write_text("{}")
    again = find_origin(str(tmp_path))
    assert again is not None
    assert again.tokenizer_folder == tmp_path


def test_what_is_none_of_these_is_named(tmp_path: Path) -> None:
    assert find_origin(None) is None
    with pytest.raises(ConfigError, match=r"no such folder \(models are not downloaded"):
        find_origin("google-bert/bert-base-uncased")
    with pytest.raises(ConfigError, match="neither a run folder"):
        find_origin(str(tmp_path))
    (tmp_path / "manifest.json").write_text("garbage")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        find_origin(str(tmp_path))


GROWING: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 80},
    "modernbert": {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 3, "intermediate_size": 80},
    "distilbert": {"dim": 48, "n_layers": 5, "n_heads": 3, "hidden_dim": 80},
    "dstrain-encoder": {"hidden_size": 48, "num_hidden_layers": 7, "num_attention_heads": 3, "intermediate_size": 80},
}


@pytest.mark.parametrize("family", GROWING)
def test_a_larger_encoder_of_every_family_begins_from_a_smaller_one(
    tmp_path: Path, tokenizer_folder: Path, family: str
) -> None:
    own = family == "dstrain-encoder"
    save_folder(tiny_model("modernbert" if own else family, seed=5), tmp_path / "small")
    large = tiny_encoder(seed=6, **GROWING[family]) if own else tiny_model(family, seed=6, **GROWING[family])
    before = {name: p.detach().clone() for name, p in large.named_parameters()}
    grow_from_smaller(large, str(tmp_path / "small"), Tokenizer.load(tokenizer_folder))
    after = dict(large.named_parameters())
    random = [name for name in before if before[name].ndim > 1 and torch.equal(before[name], after[name])]
    assert random == []
    small = tiny_model("modernbert" if own else family, seed=5).model.get_input_embeddings().weight
    embeddings = next(p for p in after.values() if p.shape == (64, 48))
    assert torch.equal(embeddings[:, :32], small), "heads of 16: the middle begins at a multiple of that, here 0"


def test_growing_to_the_same_sizes_is_a_copy(tmp_path: Path, tokenizer_folder: Path) -> None:
    small, large = tiny_model("modernbert", seed=5), tiny_model("modernbert", seed=6)
    save_folder(small, tmp_path / "small")
    grow_from_smaller(large, str(tmp_path / "small"), Tokenizer.load(tokenizer_folder))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), large.parameters()))


def test_growing_refuses_other_families_and_other_tokenizers(tmp_path: Path, tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    save_folder(tiny_model("bert"), tmp_path / "small")
    with pytest.raises(ConfigError, match=r"init_from_smaller: .*small: is a bert, this model is a modernbert"):
        grow_from_smaller(tiny_model("modernbert"), str(tmp_path / "small"), tokenizer)
    other = train_tokenizer(
        ["a b c d"] * 9, kind="wordpiece", vocab_size=40, out=tmp_path / "tok", lowercase=True, quiet=True
    )
    Tokenizer.load(other).copy_to(tmp_path / "small")
    with pytest.raises(ConfigError, match="has another tokenizer than the data"):
        grow_from_smaller(tiny_model("bert"), str(tmp_path / "small"), tokenizer)
    with pytest.raises(ConfigError, match=r"model\.init_from_smaller: .*nowhere: no such folder"):
        grow_from_smaller(tiny_model("bert"), str(tmp_path / "nowhere"), tokenizer)
