"""Derive `dstrain/corpora/movie_reviews.tsv.gz` from the published VADER ground truth, so that anybody can repeat it.

    pip download --no-deps --no-binary :all: vaderSentiment==3.3.2
    python tests/support/derive_movie_reviews.py vaderSentiment-3.3.2.tar.gz out.tsv.gz

The rule, in this order: take `movieReviewSnippets_GroundTruth.txt` out of the source distribution (id, mean human
rating from -4 to 4, sentence); leave out sentences whose |rating| is below NEAR_ZERO; leave out a sentence that stood
before with the same text; label `positive` if the rating is above zero, else `negative`. Order and ids are those of the
source.
"""

from __future__ import annotations

import gzip
import io
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

NEAR_ZERO = 0.5
"""Below it the sign is a coin: of the 15 to 29 raters, 49 % agree with the sign of their mean (92 % above)."""

INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def read_ground_truth(sdist: Path) -> list[str]:
    """The lines of the movie-review ground truth; members are read as bytes, nothing is extracted to disk."""
    with tarfile.open(sdist) as outer:
        name = next(n for n in outer.getnames() if n.endswith(INNER))
        packed = outer.extractfile(name)
        assert packed is not None, name
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as inner:
            member = inner.extractfile(MEMBER)
            assert member is not None, MEMBER
            return member.read().decode("utf-8").splitlines()


def derive(lines: Iterable[str]) -> str:
    """Apply the rule of this module; the result is the uncompressed TSV with a header line."""
    rows = ["id\tlabel\trating\ttext"]
    seen: set[str] = set()
    for line in lines:
        number, rating, text = (part.strip() for part in line.split("\t"))
        if abs(float(rating)) < NEAR_ZERO or text in seen:
            continue
        seen.add(text)
        rows.append(f"{number}\t{'positive' if float(rating) > 0 else 'negative'}\t{rating}\t{text}")
    return "\n".join(rows) + "\n"


def write_gzip(path: Path, text: str) -> None:
    """Write gzip without a name or a time in its header: the same text gives the same bytes under the same zlib."""
    with open(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=9, mtime=0) as file:
        file.write(text.encode("utf-8"))


if __name__ == "__main__":
    write_gzip(Path(sys.argv[2]), derive(read_ground_truth(Path(sys.argv[1]))))
