"""Which documents stay: length, words, letters, control characters, scripts, and filters that installed packages offer.

A filter is a pure function of one document: the same document gets the same answer in any process and order, so builds
stay reproducible. Heavier judgement (near duplicates, language, quality) belongs to a package with an entry point in
the group `dstrain.document_filters`, or to datatrove before this. Names come from the configuration; neither data nor
configuration ever names a module to import.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import regex
from pydantic import Field, field_validator, model_validator

from dstrain.base.config import Config
from dstrain.base.errors import ConfigError, DataError
from dstrain.corpus.sources import Document

HOOK_GROUP = "dstrain.document_filters"
"""Entry point group of packages that offer filters."""

Hook = Callable[[Document], "str | None"]
"""A document's reason to be dropped, or None."""

_REPLACEMENT = "\ufffd"
# C0 and C1 controls but tab, newline and carriage return; private use and unassigned code points count with them in
# shares, since text decoded with the wrong table is full of them.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")
_ODD_CATEGORIES = frozenset({"Cc", "Cs", "Co", "Cn"})
_WANTED, _FOREIGN, _OTHER, _SPACE, _ODD, _ODD_SPACE = "lfxsow"
_REASON = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


class HookConfig(Config):
    """One filter of an installed package."""

    name: str
    """Name of the entry point, as `pip`'s package lists it in the group dstrain.document_filters."""
    settings: dict[str, str] = Field(default={})
    """Keyword arguments for the filter's factory, all text."""


class FiltersConfig(Config):
    """Which documents are kept. Everything is off by default: nothing is dropped that was not asked for."""

    min_characters: int = Field(default=0, ge=0)
    """Fewest characters, white space at the ends left out."""
    max_characters: int | None = Field(default=None, ge=1)
    """Most characters; None for no limit."""
    min_words: int = Field(default=0, ge=0)
    """Fewest words, cut at white space; leave at 0 for languages written without spaces."""
    max_words: int | None = Field(default=None, ge=1)
    """Most words; None for no limit."""
    max_non_letters: float | None = Field(default=None, ge=0, le=1)
    """Largest share of non-letters (digits, punctuation, symbols) among characters other than white space; prose is
    near 0.05, tables and code near 0.3; None for no limit."""
    max_control: float | None = Field(default=None, ge=0, le=1)
    """Largest share of control, private, unassigned and replacement (U+FFFD) characters; 0.001 finds most files that
    were decoded wrongly; None for no limit."""
    scripts: tuple[str, ...] = ()
    """Unicode scripts that count as wanted, e.g. Latin, Cyrillic, Han; empty for any."""
    min_script_share: float = Field(default=0.8, ge=0, le=1)
    """Least share of letters in the wanted scripts; leaves room for names and quotations in others."""
    hooks: tuple[HookConfig, ...] = ()
    """Filters of installed packages, asked in this order after the ones above."""
    normalize: bool = False
    """Bring text to Unicode normal form NFC before anything else, so that equal-looking texts are equal."""
    strip_control: bool = False
    """Remove control characters but tab, newline and carriage return, before anything else."""

    @field_validator("scripts", "hooks", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("scripts")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if re.fullmatch(r"[A-Za-z_ ]+", name) is None:
                raise ValueError(f"{name!r} is no name of a Unicode script, such as Latin, Greek or Han")
            try:
                _script_pattern(name)
            except regex.error:
                raise ValueError(f"{name!r} is no name of a Unicode script, such as Latin, Greek or Han") from None
        return value

    @model_validator(mode="after")
    def _ordered(self) -> FiltersConfig:
        for unit in ("characters", "words"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if most is not None and least > most:
                raise ValueError(f"min_{unit}={least} is above max_{unit}={most}: nothing could pass")
        return self


class Filters:
    """The filters of a configuration, ready to be asked. Build one per process; it keeps no state between documents.

    Raises:
        ConfigError: a named hook is not installed, is offered twice, or refuses its settings.
    """

    def __init__(self, config: FiltersConfig | None = None):
        self.config = config or FiltersConfig()
        self._hooks = [(hook.name, _load(hook)) for hook in self.config.hooks]
        self._kinds = _Kinds(self.config.scripts)

    def clean(self, text: str) -> str:
        """The text as it is judged and stored: NFC and without control characters where the configuration says so."""
        if self.config.strip_control:
            text = _CONTROLS.sub("", text)
        return unicodedata.normalize("NFC", text) if self.config.normalize else text

    def judge(self, document: Document) -> str | None:
        """Why this (cleaned) document is to be dropped, as a short name such as `too_short`, or None to keep it.

        Raises:
            DataError: a hook fails or gives something else than a short reason.
        """
        reason = self._by_length(document.text) or self._by_characters(document.text)
        if reason is not None:
            return reason
        for name, hook in self._hooks:
            found = _ask(name, hook, document)
            if found is not None:
                return f"{name}:{found}"
        return None

    def apply(self, document: Document) -> tuple[Document, str | None]:
        """Clean and judge: the cleaned document and the reason to drop it, or None."""
        text = self.clean(document.text)
        if text is not document.text:
            document = dataclasses.replace(document, text=text)
        return document, self.judge(document)

    def _by_length(self, text: str) -> str | None:
        config = self.config
        if config.min_characters or config.max_characters is not None:
            count = len(text.strip())
            if count < config.min_characters:
                return "too_short"
            if config.max_characters is not None and count > config.max_characters:
                return "too_long"
        if config.min_words or config.max_words is not None:
            words = len(text.split())
            if words < config.min_words:
                return "too_few_words"
            if config.max_words is not None and words > config.max_words:
                return "too_many_words"
        return None

    def _by_characters(self, text: str) -> str | None:
        config = self.config
        if config.max_control is None and config.max_non_letters is None and not config.scripts:
            return None
        kinds = text.translate(self._kinds)
        odd = kinds.count(_ODD) + kinds.count(_ODD_SPACE)
        if config.max_control is not None and odd > config.max_control * len(text):
            return "control_characters"
        wanted, foreign = kinds.count(_WANTED), kinds.count(_FOREIGN)
        letters = wanted + foreign
        visible = len(text) - kinds.count(_SPACE) - kinds.count(_ODD_SPACE)
        if config.max_non_letters is not None and visible - letters > config.max_non_letters * visible:
            return "non_letters"
        if config.scripts and wanted < config.min_script_share * letters:
            return "script"
        return None


class _Kinds(dict[int, str]):
    """One ASCII character for each kind of character, looked up once: a table for `str.translate`, which is fast."""

    def __init__(self, scripts: Sequence[str]):
        super().__init__()
        self._patterns = [_script_pattern(name) for name in scripts]

    def __missing__(self, code: int) -> str:
        self[code] = kind = self._kind(chr(code))
        return kind

    def _kind(self, character: str) -> str:
        category = unicodedata.category(character)
        if character == _REPLACEMENT or (category in _ODD_CATEGORIES and character not in "\t\n\r"):
            return _ODD_SPACE if character.isspace() else _ODD
        if category[0] in "LM":
            return _WANTED if self._is_wanted(character, category) else _FOREIGN
        return _SPACE if character.isspace() else _OTHER

    def _is_wanted(self, character: str, category: str) -> bool:
        # Marks are often of the script "Inherited", that is, of the letter they stand on.
        if category[0] == "M" and _script_pattern("Inherited").match(character):
            return True
        return any(pattern.match(character) for pattern in self._patterns)


def filters_identity(config: FiltersConfig) -> dict[str, str]:
    """Package and version behind each hook: part of what decides the output of a build.

    Raises:
        ConfigError: a hook is not installed or offered twice.
    """
    return {hook.name: _owner(_entry_point(hook.name)) for hook in config.hooks}


def parse_hook(text: str) -> HookConfig:
    """Read `NAME` or `NAME:key=value,key=value`, the form of the command line.

    Raises:
        ConfigError: a setting has no key or no `=`.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ConfigError(f"--filter {text!r}: write NAME or NAME:key=value,key=value")
        settings[key.strip()] = value.strip()
    if not name.strip():
        raise ConfigError(f"--filter {text!r}: name a filter; installed: {_installed()}")
    return HookConfig(name=name.strip(), settings=settings)


def _entry_point(name: str) -> importlib.metadata.EntryPoint:
    found = list(
        {(e.value, _owner(e)): e for e in importlib.metadata.entry_points(group=HOOK_GROUP, name=name)}.values()
    )
    if not found:
        raise ConfigError(
            f"filters: no installed package offers a document filter {name!r}; installed: {_installed()}. "
            f"A package offers one by an entry point in the group {HOOK_GROUP}"
        )
    if len(found) > 1:
        raise ConfigError(f"filters: {name!r} is offered by {' and '.join(sorted(map(_owner, found)))}: remove one")
    return found[0]


def _owner(entry: importlib.metadata.EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.value


def _installed() -> str:
    return ", ".join(sorted({e.name for e in importlib.metadata.entry_points(group=HOOK_GROUP)})) or "none"


def _load(config: HookConfig) -> Hook:
    entry = _entry_point(config.name)
    try:
        hook = entry.load()(**config.settings)
    except Exception as error:
        raise ConfigError(
            f"filters: the filter {config.name!r} of {_owner(entry)} does not start with settings "
            f"{_shown(config.settings)}: {type(error).__name__}: {error}"
        ) from error
    if not callable(hook):
        raise ConfigError(
            f"filters: the factory of {config.name!r} ({_owner(entry)}) gave {type(hook).__name__}, "
            "not a callable that takes a document"
        )
    loaded: Hook = hook
    return loaded


def _ask(name: str, hook: Hook, document: Document) -> str | None:
    try:
        reason: object = hook(document)
    except Exception as error:
        raise DataError(f"{document.id}: the filter {name!r} failed: {type(error).__name__}: {error}") from error
    if reason is None:
        return None
    # Reasons are counted and printed: a free text (a score, the document itself) would make a line for each document.
    if not isinstance(reason, str) or _REASON.fullmatch(reason) is None:
        raise DataError(
            f"{document.id}: the filter {name!r} gave {str(reason)[:80]!r}; it must give None to keep the document, or "
            "a short reason of a-z, 0-9, '_', '.', '-'"
        )
    return reason


def _shown(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "(none)"


@functools.cache
def _script_pattern(name: str) -> Any:
    return regex.compile(rf"\p{{Script={name}}}")
