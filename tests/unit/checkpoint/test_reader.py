"""The newest whole checkpoint is found among any damage, and any range is read back bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dstrain.base.errors import CheckpointError
from dstrain.base.storage import file_sha256
from dstrain.checkpoint.manifest import MOMENTS, Fragment, model_fingerprint, sealed
from dstrain.checkpoint.reader import Checkpoint, newest_valid
from tests.support.tiny_checkpoints import SHAPES, content, fragments_of, manifest_of, save, state_of, writer_of

TENSORS = "rank-00000-of-00001.safetensors"


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.int32).tolist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("whole")
    save(folder, 4)
    save(folder, 8)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))


# --- reading ---------------------------------------------------------------------------------------------------------


def test_every_state_is_read_back_bit_for_bit_in_its_shape(whole: Path) -> None:
    checkpoint = Checkpoint(whole / "step-00000004")
    expected = state_of(4)
    for state in ("fp32", *MOMENTS):
        tensors = checkpoint.tensors(state)
        assert {name: list(t.shape) for name, t in tensors.items()} == SHAPES
        assert all(bits(t) == bits(expected[name, state]) for name, t in tensors.items())


@settings(max_examples=60)
@given(parts=st.integers(1, 7), data=st.data())
def test_any_range_is_read_from_any_split(
    tmp_path_factory: pytest.TempPathFactory, parts: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "splits" / str(parts)
    written = folder / "step-00000003"
    if not written.exists():
        fragments = fragments_of(state_of(3), parts=parts)
        writer_of(folder).save(fragments, manifest_of(3), config_yaml="", tokenizer=None)
    name, state = data.draw(st.sampled_from(list(state_of(3))))
    truth = state_of(3)[name, state]
    begin = data.draw(st.integers(0, len(truth) - 1))
    end = data.draw(st.integers(begin + 1, len(truth)))
    wanted = Fragment(name, state, begin, torch.full((end - begin,), 7.0))
    Checkpoint(written).load_into([wanted])
    assert bits(wanted.tensor) == bits(truth[begin:end])


def test_a_run_whose_optimizer_needs_other_state_is_told_what_to_do(whole: Path) -> None:
    checkpoint = Checkpoint(whole / "step-00000004")
    checkpoint.check_optimizer({"encoder.bias": MOMENTS}, kind="lamb")
    with pytest.raises(
        CheckpointError, match=r"kind: muon needs momentum_buffer of encoder\.bias, .*exp_avg_sq: resume with"
    ):
        checkpoint.check_optimizer({"encoder.bias": ("momentum_buffer",)}, kind="muon")


def test_a_range_outside_the_checkpoint_is_refused(whole: Path) -> None:
    checkpoint = Checkpoint(whole / "step-00000004")
    for fragment in (Fragment("encoder.bias", "fp32", 3, torch.zeros(4)), Fragment("ghost", "fp32", 0, torch.zeros(1))):
        with pytest.raises(CheckpointError, match="elements found"):
            checkpoint.load_into([fragment])


def test_another_model_is_told_by_its_first_difference(whole: Path) -> None:
    checkpoint = Checkpoint(whole / "step-00000004")
    checkpoint.check_model(SHAPES, fingerprint=model_fingerprint(SHAPES))
    for other, message in (
        ({**SHAPES, "encoder.bias": [6]}, r"encoder\.bias is \[5\] in the checkpoint and \[6\] in this run"),
        ({**SHAPES, "new": [1]}, r"new is absent in the checkpoint and \[1\] in this run"),
        ({k: v for k, v in SHAPES.items() if k != "scale"}, r"scale is \[\] in the checkpoint and absent in this run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.check_model(other, fingerprint=model_fingerprint(other))


def test_numbers_that_are_not_fp32_are_refused_when_read(folder: Path) -> None:
    """A hostile writer may make sizes and hashes agree; the dtype is looked at as well."""
    path = folder / "step-00000008" / TENSORS
    save_file({name: t.to(torch.float64) for name, t in load_file(path).items()}, path)
    manifest = folder / "step-00000008" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["files"][TENSORS] |= {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest.write_text(json.dumps(sealed(data)))
    checkpoint = Checkpoint(folder / "step-00000008")
    checkpoint.verify()
    with pytest.raises(CheckpointError, match=r"encoder\.bias fp32 is not 2 fp32 numbers"):
        checkpoint.tensors()


# --- damage ----------------------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def bit_flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10
    path.write_bytes(data)


def zero_filled(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def missing(path: Path) -> None:
    path.unlink()


def a_folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_the_other_step(path: Path) -> None:
    shutil.copyfile(path.parents[1] / "step-00000004" / path.name, path)


def hostile_name(path: Path) -> None:
    data = json.loads(path.read_text())
    data["files"]["../step-00000004/config.yaml"] = data["files"].pop("config.yaml")
    path.write_text(json.dumps(sealed(data)))


def garbage(path: Path) -> None:
    path.write_bytes(b"\xff\xfe garbage")


def of_a_later_version(path: Path) -> None:
    path.write_text(json.dumps(sealed({**json.loads(path.read_text()), "format_version": 99})))


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    *[(TENSORS, f) for f in (truncated, emptied, longer, bit_flipped, zero_filled, missing, a_folder_instead, of_the_other_step)],
    *[("config.yaml", f) for f in (truncated, bit_flipped, zero_filled, missing)],
    *[
        ("manifest.json", f)
        for f in (truncated, emptied, zero_filled, missing, a_folder_instead, of_the_other_step, hostile_name, garbage,
                  of_a_later_version)
    ],
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=[f"{n}-{f.__name__}" for n, f in DAMAGE])
def test_a_damaged_checkpoint_is_named_skipped_kept_and_the_next_older_taken(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder / "step-00000008" / name)
    after = content(folder)
    found = newest_valid(folder)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 4
    assert [path.name for path, _ in found.damaged] == ["step-00000008"]
    assert "step-00000008" in found.damaged[0][1]
    assert name in found.damaged[0][1] or damage is of_the_other_step
    assert content(folder) == after


def test_tensors_swapped_between_two_steps_spoil_both(folder: Path) -> None:
    a, b = (folder / step / TENSORS for step in ("step-00000004", "step-00000008"))
    one, other = a.read_bytes(), b.read_bytes()
    assert len(one) == len(other), "sizes alone must not tell"
    a.write_bytes(other)
    b.write_bytes(one)
    found = newest_valid(folder)
    assert found.checkpoint is None
    assert [path.name for path, _ in found.damaged] == ["step-00000008", "step-00000004"]
    assert all("SHA-256" in reason for _, reason in found.damaged)


def test_a_checkpoint_under_another_steps_name_is_not_taken(folder: Path) -> None:
    (folder / "step-00000008").rename(folder / "step-00000012")
    found = newest_valid(folder)
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == 4
    assert "holds step 8" in found.damaged[0][1]


def test_the_newest_is_taken_where_all_are_whole(folder: Path) -> None:
    found = newest_valid(folder)
    assert found.checkpoint is not None
    assert (found.checkpoint.manifest.step, found.damaged) == (8, ())
    one = newest_valid(folder, at_step=4)
    assert one.checkpoint is not None
    assert one.checkpoint.manifest.step == 4
    assert newest_valid(folder, at_step=5).checkpoint is None


def test_one_further_back_is_the_newest_before_a_step(folder: Path) -> None:
    one = newest_valid(folder, before_step=8)
    assert one.checkpoint is not None
    assert one.checkpoint.manifest.step == 4
    assert newest_valid(folder, before_step=4).checkpoint is None
    (folder / "step-00000004" / "manifest.json").unlink()
    assert newest_valid(folder, before_step=9).checkpoint is not None
    assert [p.name for p, _ in newest_valid(folder, before_step=8).damaged] == ["step-00000004"]


def test_files_that_nobody_vouched_for_are_never_read(folder: Path) -> None:
    stray = folder / "step-00000008" / "rank-00001-of-00001.safetensors"
    stray.write_bytes(b"garbage")
    found = newest_valid(folder)
    assert found.checkpoint is not None
    assert found.checkpoint.tensors()["encoder.bias"].tolist()[3:] == state_of(8)["encoder.bias", "fp32"].tolist()[3:]


def test_an_empty_or_absent_folder_holds_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path).checkpoint is None
    assert newest_valid(tmp_path / "absent").checkpoint is None
