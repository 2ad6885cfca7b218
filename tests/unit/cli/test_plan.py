"""`dstrain plan` from the command line: its text, its JSON, its codes and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.planner import probe as probing
from tests.support.runs import pretrain_settings, write_config

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests/golden/plan-bert-base.txt"
BERT_BASE = str(ROOT / "configs/bert-base.yaml")
GIVEN = ["--vocab-size", "30522", "--mean-context", "400"]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_plan_of_bert_base_is_the_golden_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Renew with: dstrain plan configs/bert-base.yaml --gpus 64 --gpu-type h100 --vocab-size 30522 --mean-context 400 > GOLDEN."""
    code, out, _ = planned(capsys, BERT_BASE, "--gpus", "64", "--gpu-type", "h100", *GIVEN)
    assert code == 0
    assert out == GOLDEN.read_text(encoding="utf-8")


def test_json_is_one_document_with_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, BERT_BASE, "--gpus", "64", "--json", "--simulate", "--simulate-gpus", "128", *GIVEN)
    data = json.loads(out)
    assert code == 0
    assert data["model"]["parameters"] == 109_518_912
    assert data["cluster"] == {"device": "h100", "gpus": 64, "gpus_per_node": 8, "nodes": 8, "interconnect": "ib400"}
    assert [row["gpus"] for row in data["simulation"]] == [64, 128]


def test_overrides_and_devices_change_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = planned(
        capsys, BERT_BASE, "--gpu-type", "a100", "--gpus", "8", *GIVEN, "train.micro_batch=32", "engine.zero_stage=2"
    )
    assert "8 × NVIDIA A100" in out
    assert "32 rows × 4 micro-batches × 8 ranks, ZeRO-2" in out


def test_a_plan_that_does_not_fit_ends_with_78_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = planned(capsys, BERT_BASE, "--gpu-type", "4090", "--gpus", "1", *GIVEN, "train.micro_batch=1024")
    assert code == 78
    assert "DOES NOT FIT" in out
    assert "set train.micro_batch to" in out


def test_budgets_get_settings_or_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--only", "h100,a100", "--max-gpus", "64", *GIVEN]
    code, out, _ = planned(capsys, BERT_BASE, "--budget-usd", "500", "--budget-hours", "24", *budget)
    assert code == 0
    assert "to run it: " in out
    code, out, _ = planned(capsys, BERT_BASE, "--budget-usd", "1", *budget, "--json")
    assert code == 78
    assert json.loads(out)["best"] == []
    assert json.loads(out)["nearest"]["cost"]["money"] > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: must be 1 or more, got 0"),
        (["--gpu-type", "tpu"], "--gpu-type: tpu: not in the table"),
        (["--interconnect", "carrier-pigeon"], "--interconnect: carrier-pigeon"),
        (["--gpus", "2048"], "2048 GPUs for train.global_batch=1024 rows"),
        (["--budget-usd", "-3"], "--budget-usd: must be above 0"),
        (["--restart-minutes", "-1"], "--restart-minutes: must be 0 or more"),
        (["--save-calibration", "x.json"], "nothing is measured without --probe"),
        (["--calibration", "nowhere.json"], "no such file; make one with"),
        (["--prices", "nowhere.yaml"], "nowhere.yaml"),
        (["--simulate", "--jitter", "-1"], "sigma=-1.0 must be 0 or more"),
        (["train.micro_bach=3"], "micro_bach"),
    ],
)
def test_bad_input_is_one_message(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = planned(capsys, BERT_BASE, *GIVEN, *arguments)
    assert code == 78
    assert message in err
    assert "Traceback" not in err


def test_prices_without_the_device_are_refused_with_the_line_to_add(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prices = tmp_path / "mine.yaml"
    prices.write_text("devices:\n  a100: {price_per_hour: 1.0}\n", encoding="utf-8")
    code, _, err = planned(capsys, BERT_BASE, *GIVEN, "--prices", str(prices))
    assert code == 78
    assert "h100: {price_per_hour: ...}" in err
    code, out, _ = planned(capsys, BERT_BASE, *GIVEN, "--prices", str(prices), "--gpu-type", "a100")
    assert code == 0
    assert str(prices) in out


def test_a_probe_here_calibrates_this_plan_and_a_later_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = probing.probe
    monkeypatch.setattr(probing, "probe", lambda *args, **kwargs: real(*args, **{**kwargs, "limit_s": 0.0}))
    monkeypatch.setattr(probing, "_step_rows", lambda length, on_gpu: (1, 4))
    config = str(write_config(tmp_path / "run.yaml", pretrain_settings(tmp_path / "no-shards", tmp_path / "run")))
    kept = str(tmp_path / "here.json")
    place = ["--gpu-type", "cpu", "--gpus", "2", "--vocab-size", "400", "--mean-context", "30"]
    code, out, err = planned(capsys, config, *place, "--probe", "--save-calibration", kept)
    assert code == 0, err
    assert "(measured)" in out
    _, again, _ = planned(capsys, config, *place[2:], "--calibration", kept)
    assert again == out
    code, _, err = planned(capsys, config, "--gpu-type", "h100", "--calibration", kept)
    assert code == 78
    assert "the calibration was measured on a CPU" in err


def test_a_plain_plan_imports_no_engine() -> None:
    code = (
        "import sys; from dstrain.cli.main import main; "
        f"main(['plan', {BERT_BASE!r}]); "
        "sys.exit('deepspeed' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
