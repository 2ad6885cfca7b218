import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dstrain.base.world import World
from dstrain.monitor.tensorboard import TensorBoard

# TensorBoard's writing thread dies with a traceback when its folder goes away; pytest may notice in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def files_sort_by_age(monkeypatch):
    """Number event files from 0 in each test: files of one second sort by number as text, where 10 comes before 9."""
    counter = type(event_file_writer._global_uid)(0)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def curve(folder, name):
    """What TensorBoard shows: its own reader, which follows restarts and purges."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(e.step, e.value) for e in accumulator.Scalars(name)]


def write(folder, *, start_step, steps, value):
    board = TensorBoard(folder, World(), start_step=start_step)
    for step in steps:
        board.scalars(step, {"train/loss": value})
    board.close()
    return board


def test_curves_continue_without_overlap_after_a_resume(tmp_path):
    write(tmp_path, start_step=0, steps=range(1, 8), value=1.0)
    write(tmp_path, start_step=5, steps=range(6, 10), value=2.0)
    assert curve(tmp_path, "train/loss") == [(s, 1.0) for s in range(1, 6)] + [(s, 2.0) for s in range(6, 10)]


def test_a_fresh_start_in_an_old_folder_shows_the_new_curve_only(tmp_path):
    write(tmp_path, start_step=0, steps=range(1, 4), value=1.0)
    write(tmp_path, start_step=0, steps=range(1, 3), value=2.0)
    assert curve(tmp_path, "train/loss") == [(1, 2.0), (2, 2.0)]


def test_texts_and_the_page_layout_are_written(tmp_path):
    board = TensorBoard(tmp_path, World(), start_step=0, texts={"configuration": "seed: 1"})
    board.scalars(1, {"train/loss": 1.0})
    board.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert "custom_scalars__config__" in accumulator.Tags()["tensors"]
    assert b"seed: 1" in accumulator.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]


def test_other_ranks_write_nothing(tmp_path):
    TensorBoard(tmp_path / "tensorboard", World(rank=1, size=2), start_step=0).scalars(1, {"train/loss": 1.0})
    assert not (tmp_path / "tensorboard").exists()


def test_a_deleted_folder_is_made_again_and_points_go_on(tmp_path, messages):
    folder = tmp_path / "tensorboard"
    board = TensorBoard(folder, World(), start_step=0, retry_seconds=0.0)
    board.scalars(1, {"train/loss": 1.0})
    folder.rename(tmp_path / "gone")  # unlike rmtree, this cannot meet the writing thread half way
    for step in (2, 3):
        board.scalars(step, {"train/loss": 1.0})
    board.close()
    assert curve(folder, "train/loss") == [(2, 1.0), (3, 1.0)]
    assert board.dropped >= 1
    assert len([m for m in messages if "points are being lost" in m]) == 1


def test_an_unwritable_folder_never_raises_and_is_tried_again_later_only(tmp_path, messages):
    (tmp_path / "run").write_text("a file where the folder should be")
    board = TensorBoard(tmp_path / "run" / "tensorboard", World(), start_step=0, retry_seconds=3600.0)
    for step in range(5):
        board.scalars(step, {"train/loss": 1.0})
    (tmp_path / "run").unlink()
    board.scalars(6, {"train/loss": 1.0})
    board.close()
    assert board.dropped == 6
    assert not (tmp_path / "run").exists()
    assert len([m for m in messages if "points are being lost" in m]) == 1


def test_a_value_that_is_no_number_is_lost_alone_and_not_the_run(tmp_path):
    board = TensorBoard(tmp_path, World(), start_step=0, retry_seconds=0.0)
    board.scalars(1, {"train/loss": object()})
    board.scalars(2, {"train/loss": 1.0})
    board.close()
    assert curve(tmp_path, "train/loss") == [(2, 1.0)]
    assert board.dropped == 1
