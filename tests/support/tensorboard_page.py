"""TensorBoard in a browser: start it on a folder, and read what a person would see there.

Run as a script it takes the picture of the documentation:

    python -m tests.support.tensorboard_page runs/demo docs/images/tensorboard.png
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.browser import Browser

_URL = re.compile(r"(http://127\.0\.0\.1:\d+/)")
# The page is made of elements inside of elements' shadow trees.
_DEEP = """function* deep(root) {
    for (const element of root.querySelectorAll('*')) {
        yield element;
        if (element.shadowRoot) yield* deep(element.shadowRoot);
    }
}"""


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Serve a folder on loopback, on a port that was free; gives the address."""
    command = [
        str(Path(sys.executable).parent / "tensorboard"),
        "--logdir",
        str(logdir),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = []
            for line in process.stdout or ():
                said.append(line)
                if found := _URL.search(line):
                    yield found[1]
                    return
            raise AssertionError(f"TensorBoard ended: {''.join(said)}")
        finally:
            process.terminate()


def charts(browser: Browser, address: str, *, titles: int) -> dict[str, int]:
    """Title of each chart of the custom page -> how many lines are drawn in it, once so many charts have settled."""
    browser.open(f"{address}#custom_scalars&_smoothingWeight=0")
    script = (
        f"(() => {{ {_DEEP}"
        """
        const found = {};
        for (const card of deep(document)) {
            if (card.localName !== 'tf-custom-scalar-multi-line-chart-card') continue;
            let title = '', lines = 0;
            for (const inner of deep(card.shadowRoot)) {
                if (inner.localName === 'tf-card-heading') title = inner.displayName;
                const points = inner.localName === 'path' && inner.classList.contains('line') ? inner.getAttribute('d') : '';
                if (points && points.includes('L')) lines += 1;
            }
            found[title] = lines;
        }
        return found;
    })()"""
    )
    return _settled(browser, script, lambda found: len(found) >= titles and all(found.values()))


def table(browser: Browser, address: str, *, columns: set[str]) -> list[list[str]]:
    """Texts of the hyper-parameter table, row by row, heading first, once it has these columns and a row below."""
    browser.open(f"{address}#hparams")
    script = (
        f"(() => {{ {_DEEP}"
        """
        const rows = new Map();
        for (const cell of deep(document)) {
            if (cell.localName !== 'vaadin-grid-cell-content' || !cell.innerText.trim()) continue;
            const box = cell.getBoundingClientRect();
            const y = Math.round((box.top + box.bottom) / 20);  // a cell of two lines is as high as its row, or centred in it
            if (!rows.has(y)) rows.set(y, []);
            rows.get(y).push(cell.innerText.trim());
        }
        return [...rows.entries()].sort((a, b) => a[0] - b[0]).map(entry => entry[1]);
    })()"""
    )
    found: list[list[str]] = _settled(
        browser, script, lambda rows: len(rows) > 1 and columns <= {_joined(cell) for cell in rows[0]}
    )
    return found


def texts(browser: Browser, address: str, page: str, element: str, *, until: str) -> str:
    """All that is written inside elements of a kind on one of the pages, once a certain text is among it."""
    browser.open(f"{address}#{page}")
    script = (
        f"(() => {{ {_DEEP}"
        f"""
        let all = '';
        for (const part of deep(document)) {{
            if (part.localName !== '{element}') continue;
            for (const inner of deep(part.shadowRoot || part))
                if (!['STYLE', 'SCRIPT'].includes(inner.nodeName))
                    for (const node of inner.childNodes) if (node.nodeType === 3) all += node.textContent + ' ';
        }}
        return all;
    }})()"""
    )
    found: str = _settled(browser, script, lambda all_: until in all_)
    return found


def _joined(text: str) -> str:
    """A heading without the line breaks that a narrow column puts into it."""
    return "".join(text.split())


def _settled(browser: Browser, script: str, is_complete: Any, *, timeout_s: float = 90) -> Any:
    """Ask until the answer is complete; after the time limit, whatever the answer is, for the test to tell."""
    deadline = time.monotonic() + timeout_s
    while not is_complete(found := browser.ask(script)) and time.monotonic() < deadline:
        time.sleep(0.3)
    return found


def _take_picture(logdir: Path, picture: Path) -> None:
    with tensorboard(logdir) as address, Browser(width=1500, height=1150) as browser:
        print(charts(browser, address, titles=1))
        browser.picture(picture)


if __name__ == "__main__":
    _take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
