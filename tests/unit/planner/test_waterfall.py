"""The table, the recommendation and the picture of made-up measurements."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest
import yaml

from dstrain.planner.variants import Variant, variants
from dstrain.planner.waterfall import Measurement, Waterfall, as_json, markdown, svg


def waterfall(*speeds: float) -> Waterfall:
    chosen = variants(model_type="bert", compiles=True, micro_batch=4)
    rates = [
        Measurement(variant, speed, mfu=speed / 1e4, of_roofline=speed / 5e3, peak_bytes=2 * 10**9, last_loss=5.5)
        for variant, speed in zip(chosen, speeds)
    ]
    return Waterfall("bert & co", "Measured ceilings: many.", rates, [(chosen[-1], "out of memory")])


def test_the_table_tells_each_step_against_the_first_and_the_one_before() -> None:
    text = markdown(waterfall(100.0, 250.0, 1000.0))
    assert "| padded, dense head, eager | 100 | 1.00× | 1.00× | 1.0% | 2% | 2.00 | 5.500 |" in text
    assert "| + sparse head | 1,000 | 10.00× | 4.00× | 10.0% | 20% |" in text
    assert "+ twice the micro-batch: could not run: out of memory" in text


@pytest.mark.parametrize(
    ("speeds", "name"),
    [
        ((100.0, 250.0, 1000.0), "+ sparse head"),
        ((100.0, 300.0, 299.0), "+ unpadded"),
        ((100.0, 300.0, 305.0), "+ unpadded"),
        ((100.0, 300.0, 330.0), "+ sparse head"),
    ],
)
def test_the_earliest_of_the_fastest_is_recommended(speeds: tuple[float, ...], name: str) -> None:
    found = waterfall(*speeds)
    assert found.best.variant.name == name
    assert yaml.safe_load(found.recommended()) == {k: dict(v) for k, v in found.best.variant.sections.items()}
    assert f"Recommended ({name})" in markdown(found)


def test_json_holds_every_figure() -> None:
    data = json.loads(json.dumps(as_json(waterfall(100.0, 250.0))))
    assert [v["tokens_per_second"] for v in data["variants"]] == [100.0, 250.0]
    assert data["failed"][0]["why"] == "out of memory"
    assert data["recommended"]["model"]["attention"] == "auto"


def test_the_picture_has_a_bar_for_each_and_marks_the_best() -> None:
    picture = ElementTree.fromstring(svg(waterfall(100.0, 200.0, 400.0)))
    bars = [e for e in picture.iter("{http://www.w3.org/2000/svg}rect")][1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths == pytest.approx([widths[2] / 4, widths[2] / 2, widths[2]], abs=1)
    assert len({bar.attrib["fill"] for bar in bars}) == 2
    assert "bert & co" in "".join(picture.itertext())


def test_names_cannot_break_the_picture() -> None:
    found = Waterfall("<b>", "", [Measurement(Variant("a<b", ""), 1.0, 0.1, 0.1, 1, 1.0)])
    ElementTree.fromstring(svg(found))


def test_what_changes_the_learning_is_never_recommended() -> None:
    found = waterfall(100.0, 200.0)
    other = Variant("with token dropping", "", changes_learning=True)
    faster = Measurement(other, 400.0, mfu=0.1, of_roofline=0.1, peak_bytes=1, last_loss=6.0)
    both = Waterfall("t", "", [*found.measured, faster])
    assert both.best.variant.name == "+ unpadded"
    assert "| with token dropping | 400 | 4.00× | 2.00× |" in markdown(both)
