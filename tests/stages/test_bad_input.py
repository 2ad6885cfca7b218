"""A person's mistakes: one clear message that names the thing and the fix, exit code 78 (or its own), no traceback,
nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from dstrain.base.file_operations import operations_replaced
from dstrain.base.protocols import LossParts, MicroBatch, RunState, StepReport
from dstrain.cli.main import main
from dstrain.objectives.mlm import MlmObjective
from dstrain.stages.oversight import Oversight
from dstrain.train import memory
from tests.support.faulty_disk import Fault, FaultyDisk
from tests.support.runs import BERT, build_tiny_shards, pretrain_settings, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad")


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    return build_tiny_shards(folder)


@pytest.fixture(scope="module")
def finished(folder: Path, shards: Path) -> Path:
    config = write_config(
        folder / "finished.yaml", pretrain_settings(shards, folder / "finished", train={"max_steps": 2})
    )
    assert main(["pretrain", str(config)]) == 0
    return folder / "finished"


@pytest.fixture
def run(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run pretraining with some overrides; returns what was said, after checking that it was refused cleanly."""

    def refuse(*overrides: str, code: int = 78, data: Path = shards) -> str:
        config = write_config(tmp_path / "run.yaml", pretrain_settings(data, tmp_path / "run"))
        capsys.readouterr()
        assert main(["pretrain", str(config), *overrides]) == code
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert "dstrain: error:" in said
        assert not list(tmp_path.glob("run/checkpoints/*")), "nothing may be half-written"
        return said

    return refuse


def test_an_unknown_key_names_its_neighbour(run: Callable[..., str]) -> None:
    assert "optimizer.learning_rat: unknown key. Did you mean learning_rate" in run("optimizer.learning_rat=1e-3")


def test_a_wrong_type_names_key_and_value(run: Callable[..., str]) -> None:
    said = run("train.global_batch=many")
    assert "train.global_batch" in said
    assert "'many'" in said


def test_a_missing_configuration_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["pretrain", str(tmp_path / "absent.yaml")]) == 78
    assert "no such configuration file" in capsys.readouterr().err


def test_a_batch_larger_than_the_data(run: Callable[..., str]) -> None:
    assert "train.global_batch: 100000 rows are asked for, the training data has only" in run(
        "train.global_batch=100000"
    )


def test_rows_longer_than_the_models_positions(run: Callable[..., str]) -> None:
    assert "longer than the model's 64 positions" in run("data.sequence_length=128")


def test_an_unknown_model_type_or_field(run: Callable[..., str]) -> None:
    assert "model.config.model_type: 'bart2'" in run("model.config.model_type=bart2")
    assert "Did you mean hidden_size" in run("model.config.hiden_size=32")


def test_heads_that_do_not_divide_the_width(run: Callable[..., str]) -> None:
    assert "model.config" in run("model.config.num_attention_heads=5")


def test_missing_shards(run: Callable[..., str], tmp_path: Path) -> None:
    assert "no such folder" in run(f"data.path={tmp_path / 'nowhere'}")


def test_a_folder_that_holds_no_shards(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = run(f"data.path={tmp_path / 'empty'}")
    assert "not a shards folder" in said
    assert "tokenizer train" not in said


def test_a_tokenizer_that_does_not_match_the_shards(run: Callable[..., str], shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    definition = json.loads((copy / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    first, second = [token for token, number in vocabulary.items() if number in (50, 51)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "tokenizer" / "tokenizer.json").write_text(json.dumps(definition))
    said = run(data=copy)
    assert "is not the tokenizer that" in said
    assert "fingerprint" in said


def test_a_damaged_shard_is_named(run: Callable[..., str], shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = next((copy / "train").glob("shard-*.tar"))
    data = bytearray(shard.read_bytes())
    for at in range(1500, len(data) - 12000, 700):
        data[at] ^= 0xFF
    shard.write_bytes(data)
    assert shard.name in run(data=copy)


def test_gpus_asked_for_where_there_are_none(run: Callable[..., str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "sees no GPU" in run("engine.device=cuda", code=77)


def test_a_resume_that_is_required_and_finds_nothing(run: Callable[..., str]) -> None:
    assert "train.resume is require" in run("train.resume=require", code=81)


def test_owned_and_misspelt_deepspeed_keys(run: Callable[..., str]) -> None:
    assert "set optimizer.clip_norm instead" in run("deepspeed.gradient_clipping=1.0")
    assert "removed from DeepSpeed in 0.19.8" in run("deepspeed.elasticity={enabled: true}")
    assert "Did you mean" in run("deepspeed.flops_profilr={enabled: true}")


def refuse_on(finished: Path, folder: Path, shards: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    settings = pretrain_settings(shards, finished, train={"max_steps": 4})
    capsys.readouterr()
    assert main(["pretrain", str(write_config(folder / "again.yaml", settings)), *overrides]) == 78
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_checkpoint_of_another_model(
    finished: Path, folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(p.name for p in (finished / "checkpoints").iterdir())
    said = refuse_on(finished, folder, shards, capsys, "model.config.intermediate_size=96")
    assert "from another model: bert.encoder.layer.0.intermediate.dense" in said
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == before


def test_a_resume_with_another_batch_or_seed_says_what_changed(
    finished: Path, folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "global_batch: 12 in the checkpoint, 6 now" in refuse_on(
        finished, folder, shards, capsys, "train.global_batch=6"
    )
    assert "seed: 7 in the checkpoint, 8 now" in refuse_on(finished, folder, shards, capsys, "seed=8")


def test_never_resuming_refuses_a_folder_with_checkpoints(
    finished: Path, folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "already has checkpoints" in refuse_on(finished, folder, shards, capsys, "train.resume=never")


def test_init_from_something_that_is_no_model(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "neither a run folder" in run(f"model.init_from={tmp_path / 'empty'}")


def test_init_from_another_architecture(run: Callable[..., str], finished: Path) -> None:
    assert BERT["intermediate_size"] == 64
    assert "the model needs (96, 32)" in run(f"model.init_from={finished}", "model.config.intermediate_size=96")


def test_evaluating_and_exporting_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tmp_path)]) == 78
    assert main(["export", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 78
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 78
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_resolved_configuration_of_a_run_starts_it_again(finished: Path) -> None:
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["engine"]["zero_stage"] == 1
    assert resolved["stage"] == "pretrain"
    assert main(["evaluate", str(finished)]) == 0


def test_a_stop_whose_save_fails_never_claims_to_have_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked to stop when a step is done; by then the disk is full."""
    on_step = Oversight.on_step

    def ask(oversight: Oversight, state: RunState, report: StepReport) -> None:
        on_step(oversight, state, report)
        oversight.stop.ask("SIGTERM")

    monkeypatch.setattr(Oversight, "on_step", ask)
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, tmp_path / "run"))
    with operations_replaced(FaultyDisk(Fault.fails(errno.ENOSPC), at=1, about=".staging", lasting=True)) as disk:
        assert main(["pretrain", str(config)]) == 76
    assert disk.hit is not None
    assert "could not be saved" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "exit" / "rank-00000.json").read_text())["last_saved_step"] is None


@pytest.mark.parametrize("in_training", [True, False])
def test_out_of_memory_is_answered_with_the_plan(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch, in_training: bool
) -> None:
    real = MlmObjective.loss

    def full(objective: MlmObjective, model: nn.Module, batch: MicroBatch) -> LossParts:
        if model.training is in_training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(objective, model, batch)

    monkeypatch.setattr(MlmObjective, "loss", full)
    monkeypatch.setattr(memory, "capacity_bytes", lambda device, ranks_here: 16 << 20)
    said = run()
    assert f"{'step 1' if in_training else 'an evaluation'} does not fit" in said
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in said
    assert "By the plan a rank needs 0.01 GiB of 0.02 GiB (framework 0.01 GiB, activations" in said
