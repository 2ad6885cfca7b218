"""A manifest vouches for every element exactly once, or it is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import CheckpointError
from dstrain.checkpoint.manifest import (
    CheckpointManifest,
    check_coverage,
    model_fingerprint,
    read_manifest,
    sealed,
    stored_states,
    write_manifest,
)
from tests.support.tiny_checkpoints import manifest_of

DIGEST = "0" * 64
PATH = Path("step-00000001/manifest.json")


def manifest(fragments: list[Any], *, parameters: dict[str, list[int]], states: tuple[str, ...] = ("fp32",)) -> Any:
    half = len(fragments) // 2
    files = {
        f"rank-0000{rank}-of-00002.safetensors": {"size_bytes": 1 << 20, "sha256": DIGEST, "fragments": tuple(part)}
        for rank, part in enumerate((fragments[:half], fragments[half:]))
    }
    return CheckpointManifest.model_validate(
        manifest_of(1, parameters=parameters, states=states, files=files), strict=False
    )


def written(folder: Path, **changes: Any) -> Path:
    """A valid manifest of one parameter on disk, with changes."""
    entry = {"size_bytes": 64, "sha256": DIGEST, "fragments": [["w", "fp32", 0, 6]]}
    data = {
        **manifest_of(1, parameters={"w": [2, 3]}, states=["fp32"]),
        "format": "dstrain-checkpoint",
        "format_version": 2,
        "files": {"rank-00000-of-00001.safetensors": entry},
    }
    (folder / "manifest.json").write_text(json.dumps(sealed({**data, **changes})))
    return folder


@st.composite
def splits(draw: st.DrawFn) -> tuple[dict[str, list[int]], list[tuple[str, str, int, int]]]:
    """Any shapes, cut into any fragments, in any order."""
    shapes = draw(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 5), max_size=3), min_size=1))
    fragments = []
    for name, shape in shapes.items():
        size = 1
        for n in shape:
            size *= n
        for state in ("fp32", "exp_avg"):
            cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=4))})
            fragments += [(name, state, a, b - a) for a, b in itertools.pairwise(cuts)]
    return shapes, draw(st.permutations(fragments))


@settings(max_examples=80)
@given(splits())
def test_any_split_into_fragments_covers(split: Any) -> None:
    shapes, fragments = split
    check_coverage(manifest(fragments, parameters=shapes, states=("fp32", "exp_avg")), PATH)


@settings(max_examples=80)
@given(splits(), st.data())
def test_a_fragment_lost_doubled_moved_or_resized_is_found(split: Any, data: st.DataObject) -> None:
    shapes, fragments = split
    if not fragments:
        return
    chosen = data.draw(st.sampled_from(range(len(fragments))))
    name, state, offset, count = fragments[chosen]
    by = data.draw(st.sampled_from([-1, 1]))
    wrong: list[Any] = list(fragments)
    match data.draw(st.sampled_from(["lost", "doubled", "moved", "resized", "renamed"])):
        case "lost":
            del wrong[chosen]
        case "doubled":
            wrong.append(wrong[chosen])
        case "moved":
            wrong[chosen] = (name, state, offset + by, count)
        case "resized":
            wrong[chosen] = (name, state, offset, count + by)
        case "renamed":
            wrong[chosen] = ("another", state, offset, count)
    with pytest.raises(CheckpointError, match=name if wrong[-1][0] != "another" else "stored|unknown|another"):
        check_coverage(manifest(wrong, parameters=shapes, states=("fp32", "exp_avg")), PATH)


def test_fragments_of_an_unknown_parameter_or_state_are_refused() -> None:
    for extra in (("ghost", "fp32", 0, 1), ("w", "momentum", 0, 6)):
        with pytest.raises(CheckpointError, match="unknown parameter"):
            check_coverage(manifest([("w", "fp32", 0, 6), extra], parameters={"w": [6]}), PATH)


def test_a_negative_range_is_refused_even_where_the_sum_is_right() -> None:
    with pytest.raises(CheckpointError, match="not stored once"):
        check_coverage(manifest([("w", "fp32", 0, 8), ("w", "fp32", 8, -2)], parameters={"w": [6]}), PATH)


def test_a_valid_manifest_is_read(tmp_path: Path) -> None:
    """Without what later writers of format 1 add: such checkpoints stay readable."""
    read = read_manifest(written(tmp_path))
    assert (read.health, read.read_back) == ({}, False)
    assert read.parameters == {"w": [2, 3]}
    assert read.step == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, r"format version 1; this dstrain reads version 2"),
        ({"format_version": None}, r"format version None"),
        ({"format": "something"}, r"format: "),
        ({"step": -1}, r"step: "),
        ({"step": "1"}, r"step: "),
        ({"world_size": 0}, r"world_size: "),
        ({"zero_stage": 4}, r"zero_stage: "),
        ({"surprise": 1}, r"surprise: "),
        ({"parameters": {"w": [2, -3]}}, r"refused shape \[2, -3\] of w"),
        ({"parameters": {"w": [1 << 21, 1 << 21]}}, r"refused shape"),
        ({"parameters": {"w": [2, 4]}}, r"w fp32: 6 of 8 elements are stored"),
        ({"parameters": {"w": [1 << 30]}, "files": {"a": {"size_bytes": 64, "sha256": DIGEST, "fragments": [["w", "fp32", 0, 1 << 30]]}}},
         r"a: 4294967296 bytes of fragments in 64 bytes"),
        ({"files": {"../x": {"size_bytes": 1, "sha256": DIGEST}}}, r"refused file name '\.\./x'"),
        ({"files": {"/etc/passwd": {"size_bytes": 1, "sha256": DIGEST}}}, r"refused file name"),
        ({"files": {"a": {"size_bytes": -1, "sha256": DIGEST}}}, r"files\.a\.size_bytes: "),
        ({"files": {"a": {"size_bytes": 1, "sha256": "x"}}}, r"files\.a\.sha256: "),
        ({"files": {}}, r"w fp32: 0 of 6 elements are stored"),
    ],
)  # fmt: skip
def test_a_wrong_manifest_is_refused_and_says_where(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(written(tmp_path, **changes))
    assert "manifest.json" in str(caught.value)


@settings(max_examples=60)
@given(at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_flipped_bit_changes_what_is_read(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    """The manifest holds the counters of the run: one digit of them wrong would be a silent load of another state."""
    folder = written(tmp_path_factory.mktemp("checkpoint"))
    path, before = folder / "manifest.json", read_manifest(folder)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        assert read_manifest(folder) == before  # a blank became another blank
    except CheckpointError:
        pass


def test_what_is_written_is_read_back_numbers_that_are_none_included(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path, state={"best": float("inf"), "loss": float("nan"), "name": "é"}))
    write_manifest(tmp_path, manifest)
    assert repr(read_manifest(tmp_path)) == repr(manifest)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\0\0\0", "[" * 100_000, '"text"', "{}", "12"])
def test_garbage_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_manifest(tmp_path)


def test_the_fingerprint_depends_on_names_and_shapes_not_on_their_order() -> None:
    one = model_fingerprint({"a": [2, 3], "b": [4]})
    assert one == model_fingerprint({"b": [4], "a": [2, 3]})
    assert len({one, model_fingerprint({"a": [3, 2], "b": [4]}), model_fingerprint({"a": [2, 3], "c": [4]})}) == 3


def test_parameters_may_have_states_of_their_own_and_those_are_vouched_for_too(tmp_path: Path) -> None:
    stored = stored_states({"w": ("momentum_buffer",), "v": ("exp_avg", "exp_avg_sq")})
    assert stored["parameter_states"] == {"w": ("fp32", "momentum_buffer")}
    fragments = [[name, state, 0, 6] for name, state in (
        ("w", "fp32"), ("w", "momentum_buffer"), ("v", "fp32"), ("v", "exp_avg"), ("v", "exp_avg_sq"),
    )]  # fmt: skip
    changes: dict[str, Any] = {"parameters": {"w": [2, 3], "v": [6]}, **stored}

    def files(some: list[Any]) -> dict[str, Any]:
        return {"rank-00000-of-00001.safetensors": {"size_bytes": 1 << 10, "sha256": DIGEST, "fragments": some}}

    assert read_manifest(written(tmp_path, files=files(fragments), **changes)).step == 1
    with pytest.raises(CheckpointError, match="w momentum_buffer: 0 of 6"):
        read_manifest(written(tmp_path, files=files([f for f in fragments if f[1] != "momentum_buffer"]), **changes))
    with pytest.raises(CheckpointError, match=r"unknown parameter: .*exp_avg"):
        read_manifest(written(tmp_path, files=files([*fragments, ["w", "exp_avg", 0, 6]]), **changes))
