"""Two files in the run folder by which a person, or a script, speaks to a running job: `stop` and `save`.

`stop` is a kill switch: the run saves and ends for good (exit code 82), its text is the reason, and it stays: jobs that
wait in the queue for the same folder leave at once, until somebody removes it. `save` is a save switch: one checkpoint at
the next step boundary, then the training goes on; it is removed when it was seen.
"""

from __future__ import annotations

from pathlib import Path

from dstrain.base.errors import StorageError
from dstrain.base.storage import remove_file

STOP_FILE = "stop"
SAVE_FILE = "save"
_LONGEST = 200


def stop_file_reason(run_folder: Path) -> str | None:
    """Why the kill switch says stop, or None without one."""
    path = run_folder / STOP_FILE
    try:
        with path.open("rb") as file:
            data = file.read(4 * _LONGEST)
    except FileNotFoundError:
        return None
    except OSError:
        if not path.exists():
            return None
        data = b""
    text = " ".join(data.decode("utf-8", errors="replace").split())
    words = "".join(letter for letter in text if letter.isprintable())[:_LONGEST]
    return f"stop file: {words}" if words else "stop file"


def take_save_file(run_folder: Path) -> bool:
    """Whether a save was asked for; the request is taken away, or it would be obeyed for ever."""
    path = run_folder / SAVE_FILE
    if not path.exists():
        return False
    try:
        remove_file(path)
    except StorageError:
        return False
    return True
