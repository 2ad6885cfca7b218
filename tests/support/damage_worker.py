"""launch/pretrain.py with one rank whose data turns out damaged at step 5; started by tests/fault/test_data_fault.py."""

from __future__ import annotations

import os
import sys
from typing import Any

from dstrain.base.errors import DataError
from dstrain.cli.main import main
from dstrain.data.loader import PackedLoader

if __name__ == "__main__":
    whole = PackedLoader.step

    def damaged(self: PackedLoader, step: int) -> Any:
        if step >= 5 and os.environ["RANK"] == "1":
            raise DataError("shard-000000.tar: block 3 is damaged")
        return whole(self, step)

    PackedLoader.step = damaged  # type: ignore[method-assign]
    sys.exit(main(["pretrain", *sys.argv[1:]]))
