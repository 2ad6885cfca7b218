"""The demo's own decisions: whose folder it is, what is done, what it would type. Training is in tests/stages."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest

from dstrain.base.config import parse_overrides, read_yaml
from dstrain.base.errors import ConfigError, ExitCode
from dstrain.cli import demo, demo_process
from dstrain.cli.demo import Demo, StepError
from dstrain.cli.training import load_stage_config

CONFIGS = Path(str(files("dstrain") / "corpora" / "configs"))


def _demo(folder: Path, *, quick: bool = True, seed: int = 0) -> Demo:
    folder.mkdir(exist_ok=True)
    return Demo(folder, quick=quick, seed=seed)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="not a demo"):
            _demo(tmp_path).claim(fresh=fresh)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_other_settings_are_refused_until_the_folder_is_fresh(tmp_path: Path) -> None:
    _demo(tmp_path).claim(fresh=False)
    (tmp_path / "pretrain").mkdir()
    with pytest.raises(ConfigError, match=r"quick True.*--fresh"):
        _demo(tmp_path, quick=False).claim(fresh=False)
    _demo(tmp_path, quick=False).claim(fresh=True)
    assert not (tmp_path / "pretrain").exists()
    assert json.loads((tmp_path / "demo.json").read_text())["quick"] is False


def test_the_same_settings_keep_what_is_there(tmp_path: Path) -> None:
    _demo(tmp_path).claim(fresh=False)
    (tmp_path / "pretrain").mkdir()
    _demo(tmp_path).claim(fresh=False)
    assert (tmp_path / "pretrain").is_dir()


def test_a_step_is_done_when_its_result_is_there(tmp_path: Path) -> None:
    it = _demo(tmp_path)
    done = {step.name: step.is_done for step in it.steps}
    assert not any(check() for check in done.values())
    (tmp_path / "pretrain" / "checkpoints" / f"step-{it.stop_step:08d}").mkdir(parents=True)
    assert done["pretrain"]()
    assert not done["resume"]()
    (tmp_path / "pretrain" / "checkpoints" / f"step-{it.max_steps:08d}").mkdir()
    assert done["resume"]()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(
    ("stage", "name"), [("pretrain", "pretrain"), ("finetune", "finetune"), ("finetune", "scratch")]
)
def test_the_configurations_are_valid(
    stage: str, name: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(demo_process, "run", lambda command, **_: started.append(list(command)) or 0)
    it = _demo(tmp_path, quick=quick, seed=3)
    next(step for step in it.steps if step.name == name).action()
    command = started[0]
    overrides = command[command.index("--config") + 2 :]
    config = load_stage_config(stage, Path(command[command.index("--config") + 1]), overrides)
    assert config.run_folder == tmp_path / name
    assert config.seed == 3
    assert config.engine.device == "cpu"
    assert command[command.index("--num_accelerators") + 1] == "2"


def test_the_comparison_is_the_same_model() -> None:
    pretrain, finetune, scratch = (read_yaml(CONFIGS / f"{name}.yaml") for name in ("pretrain", "finetune", "scratch"))
    assert scratch["model"]["init_from"] is None
    regularisers = {name for name in finetune["model"]["config"] if name.endswith("_dropout")}
    expected = {**pretrain["model"]["config"], **finetune["model"]["config"]}
    assert {**scratch["model"]["config"], **dict.fromkeys(regularisers, 0)} == {
        **expected,
        **dict.fromkeys(regularisers, 0),
    }
    different = {k for k in finetune if scratch.get(k) != finetune[k]}
    assert different <= {"run_folder", "model", "optimizer"}
    assert {**scratch["optimizer"], "learning_rate": 0} == {**finetune["optimizer"], "learning_rate": 0}


@pytest.mark.parametrize("name", ["runs/demo", "/a b/c: d", "/tmp/ünïcode'\"", "/1e3/x", "a#b/[c]"])
def test_any_path_survives_as_an_override(name: str) -> None:
    assert parse_overrides([f"run_folder={demo._quoted(Path(name))}"]) == {"run_folder": name}


def test_a_failed_step_keeps_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, expected in ((78, ExitCode.BAD_INPUT), (-9, ExitCode.DEFECT), (3, ExitCode.DEFECT)):
        monkeypatch.setattr(demo_process, "run", lambda command, code=code, **_: code)
        with pytest.raises(StepError, match="tokenizer") as caught:
            _demo(tmp_path).steps[0].action()
        assert caught.value.exit_code == expected
