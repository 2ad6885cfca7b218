from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError, DataError
from dstrain.corpus.documents import Document
from dstrain.corpus.filters import Filters, FiltersConfig, HookConfig, filters_identity, parse_hook

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def judge(text: str, **settings) -> str | None:
    return Filters(FiltersConfig(**settings)).judge(Document("d", text))


@given(TEXT)
def test_without_settings_everything_stays_as_it_is(text):
    assert Filters().apply(Document("d", text)) == (Document("d", text), None)


@given(TEXT, st.integers(0, 20), st.integers(1, 20))
def test_lengths_are_kept_within_their_bounds(text, least, extra):
    characters, words = len(text.strip()), len(text.split())
    bounds = {"min_characters": least, "max_characters": least + extra}
    assert (judge(text, **bounds) is None) == (least <= characters <= least + extra)
    bounds = {"min_words": least, "max_words": least + extra}
    assert (judge(text, **bounds) is None) == (least <= words <= least + extra)


@given(TEXT, st.floats(0, 1))
def test_shares_are_those_of_a_plain_count(text, limit):
    visible = [c for c in text if not c.isspace()]
    letters = [c for c in visible if unicodedata.category(c)[0] in "LM"]
    expected = len(visible) - len(letters) > limit * len(visible)
    assert (judge(text, max_non_letters=limit) == "non_letters") == expected
    odd = [c for c in text if c not in "\t\n\r" and (c == "\ufffd" or unicodedata.category(c) in ("Cc", "Co", "Cn"))]
    assert (judge(text, max_control=limit) == "control_characters") == (len(odd) > limit * len(text))


@pytest.mark.parametrize(
    ("text", "scripts", "reason"),
    [
        ("plain English, with naïve é", ("Latin",), None),
        ("décomposé: e\u0301 is e and a mark", ("Latin",), None),
        ("Это русский текст", ("Latin",), "script"),
        ("Это русский текст", ("Latin", "Cyrillic"), None),
        ("A few more English words with one слово", ("Latin",), None),
        ("漢字とかな", ("Han", "Hiragana"), None),
        ("漢字とかな", ("Hangul",), "script"),
        ("12345 67!", ("Latin",), None),  # no letters, so none of a wrong script
    ],
)
def test_letters_must_be_of_the_wanted_scripts(text, scripts, reason):
    assert judge(text, scripts=scripts) == reason


def test_least_share_of_the_wanted_script_is_a_setting():
    text = "aaaa бббб"
    assert judge(text, scripts=("Latin",), min_script_share=0.5) is None
    assert judge(text, scripts=("Latin",), min_script_share=0.51) == "script"


def test_reasons_name_what_was_wrong():
    assert judge("  a  ", min_characters=2) == "too_short"
    assert judge("abc", max_characters=2) == "too_long"
    assert judge("a b", min_words=3) == "too_few_words"
    assert judge("a b", max_words=1) == "too_many_words"


@given(TEXT)
def test_cleaning_twice_is_cleaning_once(text):
    filters = Filters(FiltersConfig(normalize=True, strip_control=True))
    once = filters.clean(text)
    assert filters.clean(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert not any(unicodedata.category(c) == "Cc" and c not in "\t\n\r" for c in once)


def test_a_document_is_judged_as_it_is_stored():
    filters = Filters(FiltersConfig(normalize=True, strip_control=True, max_characters=1))
    assert filters.apply(Document("d", "\x00e\u0301\x1b")) == (Document("d", "é"), None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scripts": ["Klingon"]}, "scripts: 'Klingon' is no name of a Unicode script"),
        ({"scripts": ["Latin}|."]}, "is no name of a Unicode script"),
        ({"min_words": 5, "max_words": 4}, "min_words=5 is above max_words=4"),
        ({"max_control": 1.5}, "max_control"),
        ({"hooks": [{"name": "x", "module": "os.system"}]}, "unknown key"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(FiltersConfig, settings, source="test")


def test_hooks_are_written_as_a_name_with_settings():
    assert parse_hook("lid") == HookConfig(name="lid")
    assert parse_hook("lid:language=de, least=0.6") == HookConfig(
        name="lid", settings={"language": "de", "least": "0.6"}
    )
    for wrong in ("lid:de", "lid:=de", "lid:a b=c"):
        with pytest.raises(ConfigError, match="write NAME or NAME:key=value"):
            parse_hook(wrong)
    with pytest.raises(ConfigError, match="name a filter"):
        parse_hook(":a=b")


MODULE = '''
class Letter:
    """Keeps documents that begin with a letter."""
    def __init__(self, letter: str, raises: str = "", gives: str = ""):
        self.letter, self.raises, self.gives = letter, raises, gives
    def __call__(self, document):
        if self.raises:
            raise RuntimeError("no model")
        return None if document.text.startswith(self.letter) else self.gives or "wrong_letter"

def no_filter():
    return 7
'''


def install(folder: Path, name: str, version: str, module: str) -> None:
    """A distribution as pip lays it out: a module and its .dist-info with entry points."""
    (folder / f"{module}.py").write_text(MODULE)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = (
        f"[dstrain.document_filters]\nletter = {module}:Letter\nseven = {module}:no_filter\nbroken = {module}:gone\n"
    )
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    install(tmp_path, "letter_filters", "1.4", "letter_filters_module")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("letter_filters_module", None)


def hook(name: str, **settings: str) -> FiltersConfig:
    return FiltersConfig(hooks=(HookConfig(name=name, settings=settings),))


@pytest.mark.usefixtures("installed")
def test_an_installed_package_offers_a_filter_by_name():
    config = hook("letter", letter="a")
    filters = Filters(config)
    assert filters.judge(Document("d", "apple")) is None
    assert filters.judge(Document("d", "pear")) == "letter:wrong_letter"
    assert filters_identity(config) == {"letter": "letter_filters 1.4"}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hook("lettre"), "no installed package offers a document filter 'lettre'; installed: broken, letter, seven"),
        (
            hook("letter", ladder="a"),
            r"'letter' of letter_filters 1\.4 does not start with settings ladder=a: TypeError",
        ),
        (hook("broken"), "'broken' of letter_filters 1.4 does not start with settings .none.: AttributeError"),
        (hook("seven"), "gave int, not a callable"),
        (hook("os.system"), "no installed package offers"),
    ],
)
def test_a_filter_that_is_missing_or_does_not_start_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        Filters(config)


@pytest.mark.usefixtures("installed")
def test_a_filter_that_fails_names_the_document():
    with pytest.raises(DataError, match=r"c\.txt:7: the filter 'letter' failed: RuntimeError: no model"):
        Filters(hook("letter", letter="a", raises="1")).judge(Document("c.txt:7", "pear"))
    with pytest.raises(DataError, match=r"c\.txt:7: the filter 'letter' gave 'a long text'; it must give None"):
        Filters(hook("letter", letter="a", gives="a long text")).judge(Document("c.txt:7", "pear"))


def test_a_filter_that_two_packages_offer_is_refused(installed):
    install(installed, "other_filters", "2", "other_filters_module")
    with pytest.raises(
        ConfigError, match=r"'letter' is offered by letter_filters 1\.4 and other_filters 2: remove one"
    ):
        Filters(hook("letter", letter="a"))
