"""`dstrain audit` and `dstrain replay` on a real run that changed its world size: sound as it is, and every doctored copy found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.checkpoint.manifest import sealed
from dstrain.cli.main import main
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.data.reader import ShardDataset
from tests.support.runs import ROOT, build_tiny_shards, pretrain_job, pretrain_settings, step_events, write_config

STEPS = 36  # past the first epoch of 28 steps


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and a run: 20 steps of two processes, the rest of one."""
    folder = tmp_path_factory.mktemp("audited")
    shards = build_tiny_shards(folder)
    config = write_config(folder / "run.yaml", pretrain_settings(shards, folder / "run"))
    for steps, world in ((20, 2), (STEPS, 1)):
        with pretrain_job(config, f"train.max_steps={steps}", world_size=world) as job:
            job.succeed()
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """The same folder, to be doctored; the run's configuration names the copied shards."""
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    config = folder / "run/config.yaml"
    config.write_text(config.read_text().replace(str(original), str(folder)))
    return folder


def audit(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> dict[str, Any]:
    code = main(["audit", str(folder / "run"), "--json", *options])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (0 if report["sound"] else 78)
    return report


def rewrite_event(folder: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "run/events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if event["event"] == "step" and event["step"] == step:
            change(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize("options", [(), ("--full",), ("--full", "--threads", "3")])
def test_a_run_of_two_world_sizes_is_sound(
    original: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    report = audit(capsys, original, *options)
    assert report["problems"] == []
    assert report["steps"] == STEPS
    assert report["worlds"] == [[0, 2], [20, 1]]
    assert report["recomputed"]["steps"] == STEPS
    assert report["recomputed"]["compared"] >= STEPS
    first, second = report["coverage"]
    assert first["complete"]
    assert not second["complete"]
    assert first["seen"] + second["seen"] == STEPS * 12
    assert first["seen"] + first["tail"] == first["rows"]
    assert second["seen"] + second["to_come"] + second["tail"] == second["rows"]
    assert first["repeated"] == second["repeated"] == first["left_out"] == second["left_out"] == 0
    assert 0 < second["tokens"] < first["tokens"] < first["all_tokens"]


def test_an_audit_up_to_a_step_leaves_out_what_came_later(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite_event(copy, 30, lambda event: event.update(step_ledger="5"))
    assert audit(capsys, copy, "--step", "20")["sound"]
    report = audit(capsys, copy)
    assert any("step 30" in problem for problem in report["problems"])
    assert report["recomputed"]["first_difference"] == 30


@pytest.mark.parametrize(
    ("field", "value"), [("step_ledger", "1"), ("ledger", "1"), ("rows", 100), ("ledger", "no number")]
)
def test_a_tampered_event_is_named(copy: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any) -> None:
    rewrite_event(copy, 11, lambda event: event.update({field: value}))
    report = audit(capsys, copy)
    assert any("step 11" in problem for problem in report["problems"]), report["problems"]


def test_a_history_that_was_made_up_as_a_whole_is_found_by_making_a_step_again(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Totals and steps agree with each other; only the data does not give them."""
    forged = 0
    for step, event in step_events(copy / "run").items():
        forged += int(event["step_ledger"]) if step < 7 else 1000 + step
        of_step = event["step_ledger"] if step < 7 else str(1000 + step)
        rewrite_event(copy, step, lambda e, s=of_step, t=forged: e.update(step_ledger=s, ledger=str(t % 2**63)))
    for manifest in (copy / "run/checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    lines = [
        line
        for line in (copy / "run/events.jsonl").read_text().splitlines()
        if '"saved"' not in line and '"ended"' not in line
    ]
    (copy / "run/events.jsonl").write_text("\n".join(lines) + "\n")
    for options in ((), ("--full",)):
        report = audit(capsys, copy, *options)
        assert report["recomputed"]["first_difference"] == 7
        assert any("step 7" in problem for problem in report["problems"])


def test_another_seed_is_named_with_both_values(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = copy / "run/config.yaml"
    config.write_text(config.read_text().replace("seed: 7", "seed: 8"))
    (problem,) = audit(capsys, copy)["problems"]
    assert "seed: 7 in the checkpoint, 8 now" in problem


def test_an_exchanged_shard_is_found_without_full(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Same name and size, other content."""
    shard = copy / "shards/train/shard-000000.tar"
    data = bytearray(shard.read_bytes())
    at = len(data) // 2
    data[at : at + 512] = bytes(byte ^ 1 for byte in data[at : at + 512])
    shard.write_bytes(data)
    report = audit(capsys, copy)
    assert any("shard-000000.tar" in problem and "damaged" in problem for problem in report["problems"])


def test_a_rebuilt_dataset_is_refused_with_both_fingerprints(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "shards")
    (copy / "other").mkdir()
    build_tiny_shards(copy / "other", num_documents=110)
    shutil.move(str(copy / "other/shards"), str(copy / "shards"))
    (problem,) = audit(capsys, copy)["problems"]
    assert "tokenizer" in problem or "fingerprints" in problem


def test_a_missing_shard_is_one_problem_and_no_traceback(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "shards/train/shard-000000.tar").unlink()
    (problem,) = audit(capsys, copy)["problems"]
    assert "shard-000000.tar" in problem
    assert "missing" in problem


def test_a_checkpoint_that_says_another_ledger_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / f"run/checkpoints/step-{STEPS:08d}/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["state"]["ledger"] = 12345
    path.write_text(json.dumps(sealed(manifest)))
    report = audit(capsys, copy)
    assert any(f"step {STEPS}" in problem and "12345" in problem for problem in report["problems"])


def test_shards_that_moved_are_given_as_an_override(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "shards").rename(copy / "moved")
    assert not audit(capsys, copy)["sound"]
    assert audit(capsys, copy, f"data.path={copy / 'moved'}")["sound"]


def test_the_printed_audit_says_what_was_seen_and_that_it_is_sound(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(original / "run")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"epoch 0 \(complete\): \d+ of \d+ rows seen, 0 repeated", said)
    assert "processes: 2 from step 1, 1 from step 21" in said
    assert said.rstrip().endswith("sound")


def test_a_run_that_went_on_with_new_data_is_sound_from_there_on(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The old shards are gone: their steps can only be compared with each other, the new ones are made again."""
    settings = ShardBuildConfig(block_tokens=512, validation_fraction=0.1)
    build_shards([str(copy / "corpus.jsonl")], tokenizer=copy / "tok", out=copy / "new", config=settings, quiet=True)
    config = write_config(copy / "again.yaml", pretrain_settings(copy / "new", copy / "run"))
    with pretrain_job(config, "train.max_steps=48", "--accept-new-data", world_size=1) as job:
        job.succeed()
    report = audit(capsys, copy, "--full")
    assert report["problems"] == []
    assert (report["origin"], report["steps"]) == (STEPS, 48)
    assert report["recomputed"]["steps"] == 48 - STEPS
    assert any("trained on other data" in note for note in report["notes"])
    assert main(["replay", str(copy / "run"), "--step", str(STEPS + 1)]) == 0
    assert main(["replay", str(copy / "run"), "--step", str(STEPS)]) == 78
    assert f"begins with step {STEPS + 1}" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["mask", "substitute"])
def test_a_run_that_did_without_a_damaged_block_is_sound(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    shutil.copytree(original / "shards", tmp_path / "shards")
    dataset = ShardDataset(tmp_path / "shards/train")
    record = dataset.blocks[3]
    path = tmp_path / "shards/train" / dataset.manifest.shards[int(record["shard"])].name
    data = bytearray(path.read_bytes())
    data[int(record["off"]) + 200] ^= 0x40
    path.write_bytes(data)
    settings = pretrain_settings(
        tmp_path / "shards", tmp_path / "run", data={"damage": policy, "prefetch_steps": 1}, train={"max_steps": 10}
    )
    with pretrain_job(write_config(tmp_path / "run.yaml", settings), world_size=2) as job:
        job.succeed()
    for options in ((), ("--full",)):
        report = audit(capsys, tmp_path, *options)
        assert report["problems"] == []
        (epoch,) = report["coverage"]
        assert epoch["left_out"] > 0
        assert (epoch["substituted"] > 0) == (policy == "substitute")
        assert epoch["repeated"] == 0


def replay(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> dict[str, Any]:
    assert main(["replay", str(folder / "run"), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("step", [1, 21, STEPS])
def test_a_replayed_step_has_the_ledger_and_counts_that_the_run_wrote(
    original: Path, capsys: pytest.CaptureFixture[str], step: int
) -> None:
    event = step_events(original / "run")[step]
    found = replay(capsys, original, "--step", str(step), "--documents", "1000")
    assert str(found["ledger"]) == str(found["written"]) == event["step_ledger"]
    assert found["counts"]["scored"] == event["num_targets"]
    assert found["counts"]["mask"] + found["counts"]["random"] + found["counts"]["kept"] == event["num_targets"]
    assert len(found["documents"]) == found["num_documents"]
    assert sum(d["tokens"] for d in found["documents"]) == found["counts"]["content"]
    assert sum(d["scored"] for d in found["documents"]) == event["num_targets"]


def test_the_shares_of_the_ranks_add_up_to_the_step_at_any_world(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = replay(capsys, original, "--step", "5", "--documents", "1000")
    parts = [
        replay(capsys, original, "--step", "5", "--rank", str(r), "--world", "5", "--documents", "1000")
        for r in range(5)
    ]
    assert sum(p["ledger"] for p in parts) % 2**63 == whole["ledger"]
    assert [d for p in parts for d in p["documents"]] == whole["documents"]


def test_the_text_of_a_replay_is_the_document_with_its_masks(
    original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every replayed document, with the marks taken out again, stands in the corpus."""
    found = replay(capsys, original, "--step", "2", "--documents", "1000")
    corpus = " ".join((original / "corpus.jsonl").read_text().lower().split())
    letters = re.sub(r"[^a-z]", "", corpus)
    for document in found["documents"]:
        text = "".join(span["text"] for span in document["spans"])
        assert re.sub(r"[^a-z]", "", text) in letters
        hidden = [span for span in document["spans"] if span["kind"] != "plain"]
        assert len(hidden) == document["scored"]
    assert main(["replay", str(original / "run"), "--step", "2", "--documents", "1000"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"\[MASK:[^\]]+\]", said)
    assert re.search(r"\{[^}]+→[^}]+\}", said)
    assert re.search(r"=\S+=", said)
    assert "\033" not in said
    assert "(as the run wrote it)" in said


def test_a_replay_that_is_not_what_the_run_wrote_says_so_and_fails(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_event(copy, 3, lambda event: event.update(step_ledger="99"))
    assert main(["replay", str(copy / "run"), "--step", "3"]) == 78
    assert "the run wrote ledger 99" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--step", "0"), "--step: 0 is too small"),
        (("--step", str(STEPS + 1)), f"has trained {STEPS} steps as far as its events and checkpoints say"),
        (("--step", "3", "--rank", "4", "--world", "2"), "--rank: 4"),
    ],
)
def test_a_step_or_rank_that_cannot_be_is_one_message(
    original: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert main(["replay", str(original / "run"), *options]) == 78
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 78
    assert "not a run folder" in capsys.readouterr().err


def test_audit_and_replay_import_no_engine() -> None:
    code = (
        "import sys, dstrain.cli.main as m; m.build_parser(); assert 'torch' not in sys.modules; "
        "import dstrain.stages.audit, dstrain.stages.replay; assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
