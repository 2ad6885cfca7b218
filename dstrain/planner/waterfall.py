"""The result of `dstrain bench` as text, JSON and a picture. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from dstrain.base.config import dump_yaml
from dstrain.planner.variants import Variant

_WIDTH, _BAR, _LEFT = 860, 26, 230
_WORTH_IT = 1.02
"""A saver that gains less than this is not recommended: it is within what repeated runs differ by."""


@dataclass(frozen=True)
class Measurement:
    """One variant."""

    variant: Variant
    tokens_per_second: float
    mfu: float
    """Useful FLOP over the device's peak (on a CPU: over its best measured matrix product)."""
    of_roofline: float
    """Seconds that the measured ceilings would need, over the seconds it took."""
    peak_bytes: int
    last_loss: float


@dataclass(frozen=True)
class Waterfall:
    """All variants of a model on a device."""

    title: str
    """Model, data, device."""
    ceilings: str
    """What was measured of the device."""
    measured: Sequence[Measurement]
    """In the order of the waterfall; the first is the baseline."""
    failed: Sequence[tuple[Variant, str]] = ()
    """Variants that could not run, and why."""

    @property
    def best(self) -> Measurement:
        """The fastest, or an earlier one that is as fast."""
        same = [m for m in self.measured if not m.variant.changes_learning]
        top = max(m.tokens_per_second for m in same)
        return next(m for m in same if m.tokens_per_second * _WORTH_IT >= top)

    def recommended(self) -> str:
        """The best variant's keys as YAML."""
        return dump_yaml({name: dict(section) for name, section in self.best.variant.sections.items()})


def markdown(found: Waterfall) -> str:
    """The table, the recommended keys, and what failed."""
    base = found.measured[0].tokens_per_second
    lines = [
        f"# {found.title}", "", found.ceilings, "",
        "| step | tokens/s | against the first | against the one before | MFU (useful) | of the roofline | memory, GB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    before = base
    for m in found.measured:
        if m.variant.changes_learning:
            before = found.best.tokens_per_second
        lines.append(
            f"| {m.variant.name} | {m.tokens_per_second:,.0f} | {m.tokens_per_second / base:.2f}× | {m.tokens_per_second / before:.2f}× | "
            f"{m.mfu:.1%} | {m.of_roofline:.0%} | {m.peak_bytes / 1e9:.2f} | {m.last_loss:.3f} |"
        )
        before = m.tokens_per_second
    lines += ["", *(f"{v.name}: could not run: {why}" for v, why in found.failed)]
    lines += [
        "", "A token is a real one: padding does not count. MFU counts useful arithmetic only, packed documents by the sum of their "
        "squared lengths. Losses are of the same steps and differ in their last digits only, with twice the micro-batch apart. "
        "Lines that begin with \"with\" change what is learned, stand against the best one, and are never recommended.",
        "", f"Recommended ({found.best.variant.name}):", "", "```yaml", found.recommended().rstrip(), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def as_json(found: Waterfall) -> dict[str, Any]:
    """Plain data."""
    return {
        "title": found.title, "ceilings": found.ceilings, "recommended": dict(found.best.variant.sections),
        "variants": [
            {
                "name": m.variant.name, "what": m.variant.what, "tokens_per_second": m.tokens_per_second, "mfu": m.mfu,
                "of_roofline": m.of_roofline, "peak_bytes": m.peak_bytes, "last_loss": m.last_loss,
            }
            for m in found.measured
        ],
        "failed": [{"name": v.name, "why": why} for v, why in found.failed],
    }  # fmt: skip


def svg(found: Waterfall) -> str:
    """Bars of tokens a second."""
    top = max(m.tokens_per_second for m in found.measured)
    height = 60 + (_BAR + 8) * len(found.measured)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="12" y="26" font-size="15">{escape(found.title)}: useful tokens a second</text>',
    ]
    base = found.measured[0].tokens_per_second
    for number, m in enumerate(found.measured):
        y = 44 + number * (_BAR + 8)
        width = max(1.0, (_WIDTH - _LEFT - 150) * m.tokens_per_second / top)
        colour = "#2a6f97" if m is found.best else "#a9c4d6"
        parts += [
            f'<text x="{_LEFT - 8}" y="{y + 18}" text-anchor="end">{escape(m.variant.name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{width:.0f}" height="{_BAR}" fill="{colour}"/>',
            f'<text x="{_LEFT + width + 8:.0f}" y="{y + 18}">{m.tokens_per_second:,.0f} ({m.tokens_per_second / base:.1f}×)</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
