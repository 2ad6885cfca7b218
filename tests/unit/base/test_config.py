from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from dstrain.base.config import (
    Config,
    dump_yaml,
    load_config,
    merge,
    parse_overrides,
    parse_yaml,
    read_yaml,
    to_plain,
    validate,
)
from dstrain.base.errors import ConfigError


class Inner(Config):
    max_steps: int = Field(default=10, ge=1)
    learning_rate: float = 0.1
    names: tuple[str, ...] = ()


class Even(Config):
    kind: Literal["even"] = "even"
    number: int = 2

    @model_validator(mode="after")
    def _even(self) -> "Even":
        if self.number % 2:
            raise ValueError(f"number={self.number} is odd; nearest: {self.number + 1}")
        return self


class Run(Config):
    path: Path
    seed: int = 0
    train: Inner = Inner()
    extra: Even | None = None


def load(text, tmp_path, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(Run, file, overrides)


def refusal(text, tmp_path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, *overrides)
    return str(caught.value)


# --- reading -------------------------------------------------------------------------------------------------------


def test_a_file_becomes_the_model_with_defaults_filled_in(tmp_path):
    config = load("path: a/b\ntrain:\n  names: [x, y]\n", tmp_path)
    assert config == Run(path=Path("a/b"), train=Inner(names=("x", "y")))
    assert config.seed == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("5E3", 5000.0), ("1.e+2", 100.0), (".5e1", 5.0), ("-2e-3", -2e-3), ("+1e2", 100.0)],
)
def test_scientific_notation_without_a_dot_is_a_number(text, value):
    parsed = parse_yaml(f"x: {text}", source="t")["x"]
    assert isinstance(parsed, float)
    assert parsed == value


@pytest.mark.parametrize("text", ["1e", "e5", "1e-", "a1e4", "'1e-4'"])
def test_what_is_not_quite_a_number_stays_text(text):
    assert isinstance(parse_yaml(f"x: {text}", source="t")["x"], str)


def test_an_empty_file_gives_only_defaults(tmp_path):
    assert load("", tmp_path, "path=p").train == Inner()


def test_the_same_key_twice_is_refused_with_its_line(tmp_path):
    message = refusal("path: a\nseed: 1\nseed: 2\n", tmp_path)
    assert "run.yaml, line 3" in message
    assert "'seed' stands twice" in message


def test_the_same_nested_key_twice_is_refused(tmp_path):
    assert "'max_steps' stands twice" in refusal("path: a\ntrain: {max_steps: 1, max_steps: 2}", tmp_path)


@pytest.mark.parametrize("text", ["2020-01-01: x", "null: x"])
def test_a_key_that_is_neither_text_nor_number_is_refused(text, tmp_path):
    assert "is neither text nor a number" in refusal(text, tmp_path)


def test_broken_yaml_names_file_and_line(tmp_path):
    message = refusal("path: a\ntrain: [1, 2\nseed: 3\n", tmp_path)
    assert "run.yaml, line 3: not valid YAML" in message


def test_yaml_cannot_build_python_objects(tmp_path):
    assert "not valid YAML" in refusal("path: !!python/object/apply:os.getcwd []", tmp_path)


def test_a_list_at_the_top_is_no_configuration(tmp_path):
    assert "mapping of keys, found list" in refusal("- path\n", tmp_path)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"path: \xff\xfe")
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8: byte 0xff at offset 6.*iconv"):
        load_config(Run, file)
    file.write_bytes("path: a".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"run\.yaml: not UTF-8.*iconv -f UTF-16"):
        load_config(Run, file)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"\xef\xbb\xbfpath: a")
    assert load_config(Run, file).path == Path("a")


def test_a_folder_in_place_of_a_file_names_what_it_holds(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder, not a configuration file\. Give a YAML file"):
        load_config(Run, tmp_path)
    (tmp_path / "bert-base.yaml").write_text("path: a")
    with pytest.raises(ConfigError, match=r"is a folder.*Give one of its files: bert-base\.yaml"):
        load_config(Run, tmp_path)


def test_a_missing_file_suggests_its_neighbours(tmp_path):
    (tmp_path / "bert-base.yaml").write_text("path: a")
    (tmp_path / "zebra.yaml").write_text("path: a")
    with pytest.raises(ConfigError, match=r"no such configuration file.*Did you mean .*bert-base\.yaml\?") as caught:
        load_config(Run, tmp_path / "bert-bas.yaml")
    assert "zebra" not in str(caught.value)


def test_a_missing_file_without_neighbours_offers_none(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(Run, tmp_path / "x.yaml")
    assert str(caught.value) == f"{tmp_path / 'x.yaml'}: no such configuration file."


# --- include -------------------------------------------------------------------------------------------------------


def test_includes_are_overlaid_in_order_and_the_file_wins(tmp_path):
    (tmp_path / "one.yaml").write_text("seed: 1\ntrain: {max_steps: 1, learning_rate: 1.0}")
    (tmp_path / "two.yaml").write_text("train: {max_steps: 2}")
    config = load("include: [one.yaml, two.yaml]\npath: own\ntrain: {names: [n]}", tmp_path, "seed=7")
    assert (config.seed, config.train) == (7, Inner(max_steps=2, learning_rate=1.0, names=("n",)))


def test_an_include_may_be_a_single_name_and_is_sought_beside_the_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.yaml").write_text("seed: 5")
    (tmp_path / "deep" / "run.yaml").write_text("include: one.yaml\npath: p")
    assert read_yaml(tmp_path / "deep" / "run.yaml") == {"seed": 5, "path": "p"}


def test_an_included_file_cannot_include_others(tmp_path):
    (tmp_path / "one.yaml").write_text("include: [two.yaml]")
    message = refusal("include: [one.yaml]\npath: a", tmp_path)
    assert "one.yaml: an included file cannot include others" in message
    assert str(tmp_path / "run.yaml") in message


@pytest.mark.parametrize("value", ["3", "[1]", "{a: b}"])
def test_an_include_that_is_no_file_name_is_refused(value, tmp_path):
    assert "include: must be a file name" in refusal(f"include: {value}\npath: a", tmp_path)


# --- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_nest_merge_and_are_read_as_yaml():
    parsed = parse_overrides(["train.max_steps=100", "train.learning_rate=1e-4", "path=a=b", "names=[x, y]", "on= "])
    assert parsed == {
        "train": {"max_steps": 100, "learning_rate": 1e-4},
        "path": "a=b",
        "names": ["x", "y"],
        "on": None,
    }


def test_the_last_override_of_a_key_wins():
    assert parse_overrides(["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


@pytest.mark.parametrize("text", ["train.max_steps", "=3", "a..b=3", ".a=3", "a.=3"])
def test_an_override_without_key_or_equals_sign_shows_the_right_form(text):
    with pytest.raises(ConfigError, match=r"write key\.path=value, for example train\.max_steps=100"):
        parse_overrides([text])


def test_an_override_with_broken_yaml_is_named():
    with pytest.raises(ConfigError, match=r"override 'a=\[1'.*not valid YAML"):
        parse_overrides(["a=[1"])


def test_faults_of_overrides_alone_are_the_command_lines():
    with pytest.raises(ConfigError, match=r"^command line: path: this key is required and missing$"):
        load_config(Run, None, ["seed=3"])


# --- refusals ------------------------------------------------------------------------------------------------------


def test_an_unknown_key_gets_the_nearest_valid_one(tmp_path):
    message = refusal("path: a\nsede: 3\n", tmp_path)
    assert message == f"{tmp_path / 'run.yaml'}: sede: unknown key. Did you mean seed?"


def test_an_unknown_nested_key_is_compared_with_its_own_section(tmp_path):
    assert "train.max_step: unknown key. Did you mean max_steps?" in refusal("path: a\ntrain: {max_step: 3}", tmp_path)


def test_a_key_inside_an_optional_section_is_compared_with_that_section(tmp_path):
    assert "extra.numbr: unknown key. Did you mean number?" in refusal("path: a\nextra: {numbr: 2}", tmp_path)


def test_a_known_key_in_the_wrong_section_gets_its_full_path(tmp_path):
    assert "learning_rate: unknown key. Did you mean train.learning_rate?" in refusal(
        "path: a\nlearning_rate: 1.0", tmp_path
    )


def test_a_key_like_no_other_gets_the_list_of_valid_ones(tmp_path):
    assert "qqqq: unknown key. Valid keys here: extra, path, seed, train" in refusal("path: a\nqqqq: 1", tmp_path)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("seed: 'three'", "seed: input should be a valid integer (got 'three')"),
        ("seed: 1.5", "(got 1.5)"),
        ("seed: true", "(got True)"),
        ("seed: '3'", "(got '3')"),
        ("train: {max_steps: 0}", "train.max_steps: input should be greater than or equal to 1 (got 0)"),
        ("train: 3", "train: "),
    ],
)
def test_a_wrong_type_or_range_names_key_and_value(line, shown, tmp_path):
    assert shown in refusal(f"path: a\n{line}", tmp_path)


def test_an_integer_is_welcome_where_a_number_is_asked_for(tmp_path):
    assert load("path: a\ntrain: {learning_rate: 1}", tmp_path).train.learning_rate == 1.0


def test_an_impossible_pair_speaks_in_its_own_words(tmp_path):
    assert refusal("path: a\nextra: {number: 3}", tmp_path).endswith("run.yaml: extra: number=3 is odd; nearest: 4")


def test_all_problems_come_in_one_message_each_with_file_and_key(tmp_path):
    lines = refusal("sede: 1\nseed: x\ntrain: {max_steps: 0, nmaes: []}\n", tmp_path, "extra.number=5").splitlines()
    assert all(line.startswith(f"{tmp_path / 'run.yaml'}: ") for line in lines)
    keys = {line.split(": ")[1] for line in lines}
    assert keys == {"path", "sede", "seed", "train.max_steps", "train.nmaes", "extra"}


def test_a_configuration_cannot_be_changed_after_it_was_checked():
    config = Inner()
    with pytest.raises(ValueError, match="frozen"):
        config.max_steps = 3


# --- plain data ----------------------------------------------------------------------------------------------------

# Text without control and line-separator characters, which PyYAML folds, and text that looks like a number.
text = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=6) | st.from_regex(
    r"[-+]?[0-9.]{1,3}e[-+]?[0-9]{1,2}", fullmatch=True, alphabet=st.characters(codec="ascii")
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(text, plain, max_size=4)


@given(mappings)
def test_yaml_written_is_read_back_equal(data):
    assert parse_yaml(dump_yaml(data), source="t") == data


@given(mappings, mappings)
def test_merging_keeps_every_key_and_lets_the_second_win(base, over):
    merged = merge(base, over)
    assert set(merged) == set(base) | set(over)
    assert merge(merged, over) == merged
    for key, value in over.items():
        if not (isinstance(value, dict) and isinstance(base.get(key), dict)):
            assert merged[key] == value


def test_text_that_looks_like_a_number_stays_text():
    assert parse_yaml(dump_yaml({"name": "1e-4"}), source="t") == {"name": "1e-4"}


def test_a_resolved_configuration_survives_yaml(tmp_path):
    config = load("path: a\nextra: {number: 4}\ntrain: {learning_rate: 1e-5, names: [x]}", tmp_path)
    assert validate(Run, parse_yaml(dump_yaml(to_plain(config)), source="t"), source="t") == config
