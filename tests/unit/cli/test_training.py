"""What a launcher or a person may write behind `pretrain`, `finetune` and `evaluate`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import training
from dstrain.cli.main import main
from tests.support.runs import pretrain_settings, write_config


class Seen:
    """What the stages were called with."""

    config: Any = None
    world: Any = None
    stop: Any = None
    step: Any = None
    average: Any = None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Stages that only look."""
    from dstrain.stages import evaluate, finetune, pretrain

    calls = Seen()

    def stage(config: Any, world: Any, *, stop: Any) -> int:
        calls.config, calls.world, calls.stop = config, world, stop
        return 0

    def score(kind: str, config: Any, world: Any, *, step: int | None, average: str | None) -> dict[str, float]:
        calls.config, calls.world, calls.step, calls.average = config, world, step, average
        return {"loss": 1.5}

    monkeypatch.setattr(pretrain, "pretrain", stage)
    monkeypatch.setattr(finetune, "finetune", stage)
    monkeypatch.setattr(evaluate, "evaluate", score)
    monkeypatch.setattr(training, "choose_early", lambda config: None)
    return calls


@pytest.fixture
def run_yaml(tmp_path: Path) -> str:
    return str(write_config(tmp_path / "run.yaml", pretrain_settings(tmp_path / "shards", tmp_path / "run")))


@pytest.mark.parametrize(
    "argv",
    [
        ["FILE", "train.max_steps=99"],
        ["train.max_steps=99", "FILE"],
        ["--config", "FILE", "train.max_steps=99"],
        ["train.max_steps=99", "--config", "FILE"],
        ["--config=FILE", "train.max_steps=99"],
        ["--local_rank=0", "--config", "FILE", "train.max_steps=99"],  # as deepspeed injects it
        ["--local-rank", "0", "FILE", "train.max_steps=99"],  # as older torch launchers do
        ["FILE", "--local_rank", "0", "train.max_steps=99"],
        ["FILE", "seed=1", "--deepspeed", "train.max_steps=99"],
    ],
    ids=" ".join,
)
def test_file_and_overrides_may_stand_in_any_order(seen: Seen, run_yaml: str, argv: list[str]) -> None:
    assert main(["pretrain", *[part.replace("FILE", run_yaml) for part in argv]]) == 0
    assert seen.config.train.max_steps == 99
    assert (seen.world.rank, seen.world.size) == (0, 1)


@pytest.mark.parametrize(
    ("argv", "found"), [([], "none"), (["a.yaml", "b.yaml"], "a.yaml, b.yaml"), (["a.yaml", "--config", "b.yaml"], "a.yaml, b.yaml")]
)  # fmt: skip
def test_exactly_one_file_is_wanted(argv: list[str], found: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *argv]) == 78
    assert f"give exactly one configuration file (found: {found})" in capsys.readouterr().err


def test_a_deepspeed_file_lies_over_the_runs_own_section_and_under_the_command_line(
    seen: Seen, run_yaml: str, tmp_path: Path
) -> None:
    overlay = tmp_path / "ds.json"
    overlay.write_text(json.dumps({"flops_profiler": {"enabled": True, "profile_step": 3}}))
    argv = ["pretrain", run_yaml, "--deepspeed_config", str(overlay), "deepspeed.flops_profiler.profile_step=5"]
    assert main(argv) == 0
    assert seen.config.deepspeed.values() == {"flops_profiler": {"enabled": True, "profile_step": 5}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train_batch_size": 32}', "ds.json: deepspeed.train_batch_size: set train.global_batch instead"),
        ('{"zero_optimization": {"stage": 3}}', "set engine.zero_stage and engine.bucket_elements instead"),
        ('{"aio": {"block_size": "auto"}}', '"auto" is a habit of other tools'),
        ("[1]", "a DeepSpeed configuration is a JSON object, found list"),
        ("{", "not readable as JSON"),
        (None, "no such file"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_laid_over_is_refused(
    seen: Seen, run_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "ds.json").write_text(content)
    assert main(["pretrain", run_yaml, "--deepspeed_config", str(tmp_path / "ds.json")]) == 78
    assert message in capsys.readouterr().err
    assert seen.config is None


def test_a_local_rank_that_contradicts_the_environment_is_refused(
    seen: Seen, run_yaml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["pretrain", run_yaml, "--local_rank=1"]) == 0
    assert seen.world.rank == 1
    assert main(["pretrain", run_yaml, "--local_rank=0"]) == 78
    assert "contradicts LOCAL_RANK=1" in capsys.readouterr().err


def test_only_the_first_rank_complains_about_the_configuration(
    run_yaml: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["pretrain", run_yaml, "train.max_stepz=1"]) == 78
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["pretrain", run_yaml, "train.max_stepz=1"]) == 78
    assert "train.max_stepz: unknown key" in capsys.readouterr().err


def finished(folder: Path) -> Path:
    write_config(
        folder / "config.yaml", {"stage": "pretrain", **pretrain_settings(folder / "shards", Path("moved/from"))}
    )
    return folder


@pytest.mark.parametrize(
    "argv",
    [["RUN", "train.micro_batch=3"], ["--run", "RUN", "train.micro_batch=3"], ["RUN", "--step", "4", "train.micro_batch=3"],
     ["RUN", "--average", "last:3", "train.micro_batch=3"], ["--local_rank=0", "--run", "RUN", "--step", "4", "train.micro_batch=3"]],
    ids=" ".join,
)  # fmt: skip
def test_evaluate_takes_the_run_folder_as_argument_or_option(
    seen: Seen, tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(finished(tmp_path / "run"))
    assert main(["evaluate", *[part.replace("RUN", folder) for part in argv]]) == 0
    assert seen.config.train.micro_batch == 3
    assert str(seen.config.run_folder) == folder, "a run may have been moved"
    assert seen.step == (4 if "--step" in argv else None)
    assert seen.average == ("last:3" if "--average" in argv else None)
    assert json.loads(capsys.readouterr().out) == {"loss": 1.5}


def test_evaluate_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 78
    assert "give the run folder" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 78
    assert "not a run folder (config.yaml is missing)" in capsys.readouterr().err


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank writes into the environment of its process."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("clean_environment")
def test_threads_and_interfaces_are_set_before_the_stage_is_imported(seen: Seen, run_yaml: str) -> None:
    assert main(["pretrain", run_yaml, "engine.threads=3", "engine.compile_cache=/fast"]) == 0
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OPENBLAS_NUM_THREADS"]) == ("3", "3")
    assert os.environ["TRITON_CACHE_DIR"] == "/fast/triton"


@pytest.mark.usefixtures("clean_environment", "seen")
def test_an_evaluation_takes_them_from_the_runs_own_configuration(tmp_path: Path) -> None:
    write_config(tmp_path / "run/config.yaml", pretrain_settings(tmp_path, tmp_path / "run", engine={"threads": 5}))
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert main(["evaluate", str(tmp_path / "run"), "engine.threads=2"]) == 0
    assert os.environ["OMP_NUM_THREADS"] == "2"


@pytest.mark.usefixtures("clean_environment")
def test_an_interface_that_a_machine_lacks_is_left_for_its_ranks_to_tell_the_others(seen: Seen, run_yaml: str) -> None:
    """Leaving here, before the ranks have met, would let the ranks of other machines wait for this one."""
    assert main(["pretrain", run_yaml, "engine.interface=nowhere0"]) == 0
    assert seen.config.engine.interface == "nowhere0"


@pytest.mark.usefixtures("clean_environment", "seen")
@pytest.mark.parametrize("override", ["engine=3", "engine.threads=none", "engine.bind=tight", "engine.interface=^lo"])
def test_a_wrong_engine_section_is_told_by_the_reader_of_the_whole(
    override: str, run_yaml: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", run_yaml, override]) == 78
    assert f"run.yaml: {override.split('=')[0]}: " in capsys.readouterr().err


def test_a_key_with_dashes_is_shown_without_them(run_yaml: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["pretrain", run_yaml, "--max_steps", "3"])
    assert left.value.code == 2
    assert "as in train.max_steps=100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "text", "said"),
    [
        ("pretrain", "task: {}", "has the section task, so it configures `dstrain finetune`"),
        ("finetune", "data: {}", "has the section data, so it configures `dstrain pretrain`"),
        ("pretrain", "# nothing yet", "holds no keys"),
    ],
)
def test_a_file_of_the_other_stage_is_named_in_one_line(
    stage: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main([stage, str(file)]) == 78
    told = capsys.readouterr().err
    assert f"{file}: {said}" in told
    assert told.count("\n") == 1


def test_a_run_of_the_other_stage_is_left_as_it_is(
    run_yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("stage: finetune\n")
    assert main(["pretrain", run_yaml]) == 78
    assert f"run_folder: {run}: holds a finetune run, this is pretrain" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
