"""What a person sees of a run in TensorBoard, in a real browser: every chart by its title, with its curves, and the other pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.monitor.tensorboard import LAYOUT
from tests.support.browser import Browser
from tests.support.runs import build_tiny_shards, pretrain_job, pretrain_settings, write_config
from tests.support.tensorboard_page import charts, table, tensorboard, texts

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of two ranks that has everything to show."""
    home = tmp_path_factory.mktemp("browser")
    settings = pretrain_settings(
        build_tiny_shards(home), home / "runs/tiny", train={"max_steps": 30, "evaluate_every": 10},
        stragglers={"every_steps": 5},
        monitor={"log_every": 2, "tensorboard": True, "histograms_every": 10, "peak_tflops": 0.01, "gpu_hour_usd": 2.0},
    )  # fmt: skip
    with pretrain_job(write_config(home / "run.yaml", settings), world_size=2) as job:
        job.succeed()
    return home / "runs/tiny"


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with tensorboard(run.parent) as found:
        yield found


def test_every_chart_is_on_the_page_with_a_curve_in_it(browser: Browser, address: str, tmp_path: Path) -> None:
    titles = [title for group in LAYOUT.values() for title in group]
    found = charts(browser, address, titles=len(titles))
    assert sorted(found) == sorted(titles)
    assert [title for title, lines in found.items() if lines == 0] == []
    assert found["loss"] >= 2, "of training and of held-out data"
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_settings_and_final_figures(browser: Browser, address: str, run: Path) -> None:
    columns = {
        "model",
        "optimizer.learning_rate",
        "train.global_batch",
        "held_out_loss",
        "tokens_per_second",
        "cost_usd",
    }
    heading, row = table(browser, address, columns=columns)
    assert columns <= {"".join(cell.split()) for cell in heading}
    assert any("bert" in cell for cell in row)
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    last = [event for event in lines if event["event"] == "evaluated"][-1]["metrics"]
    shown = [float(word) for cell in row for word in cell.split() if word.replace(".", "").replace("e-", "").isdigit()]
    for value in (last["loss"], last["accuracy"], 0.002, 12.0):
        assert any(number == pytest.approx(value, rel=1e-3) for number in shown), f"{value} is not in {row}"


def test_the_resolved_configuration_is_there_to_read(browser: Browser, address: str) -> None:
    page = texts(browser, address, "text", "tf-text-loader", until="learning_rate: 0.002")
    assert "learning_rate: 0.002" in page
    assert "histograms_every: 10" in page


def test_histograms_of_weights_and_gradients_are_drawn(browser: Browser, address: str) -> None:
    page = texts(browser, address, "histograms", "body", until="gradients/")
    assert "gradients" in page
    assert "weights" in page
