"""The commands of docs/clusters.md, for the tests that run them: what is run is what the page says, with named changes only."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from tests.support.runs import ROOT

PAGE = ROOT / "docs/clusters.md"


def page_lines() -> list[str]:
    """The lines of the page's code blocks, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [stripped for line in lines if (stripped := re.sub(r"\s+#\s.*", "", line).strip())]


def page_line(start: str) -> str:
    """The one line of the page that begins so.

    Raises:
        AssertionError: there is none, or several.
    """
    found = [line for line in page_lines() if line.startswith(start)]
    assert len(found) == 1, f"{PAGE.name} has {len(found)} lines that begin with {start!r}"
    return found[0]


def page_command(start: str, changes: Mapping[str, object]) -> list[str]:
    """The words of a line of the page, as a shell takes them, some of them changed.

    Args:
        start: how the line begins.
        changes: word of the page -> what stands in its place; every one must occur.
    """
    words = shlex.split(page_line(start))
    assert changes.keys() <= set(words), f"not in {words}: {changes.keys() - set(words)}"
    return [str(changes.get(word, word)) for word in words]
