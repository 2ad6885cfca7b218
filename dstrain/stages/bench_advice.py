"""From what a loader benchmark measured to a forecast and plain words: pure functions, no clock and no file.

The steady cost of a token is the sum of its parts: making a block ready (read, unpack, pack) is paid once for each time
a block comes into the cache, the rest for every token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PARTS = ("read", "packing", "gather", "masking", "ledger")


@dataclass(frozen=True)
class Measured:
    """What `stages.loader_bench` saw; seconds are of one thread unless they say wall."""

    sequence_length: int
    cpu_s_per_mtok: dict[str, float]
    """CPU seconds for a million tokens, by part; a block's cost is spread over its tokens."""
    wall_s: float
    """Wall seconds of the loop."""
    wall_mtok: float
    """Million tokens the loop delivered; its first steps fill the shuffle windows, so it is no measure of steady."""
    reread_factor: float
    """Times a block is read while its window lasts: 1 when the windows fit the cache."""
    block_tokens: float
    """Mean tokens of a block."""
    padding_percent: float
    bytes_per_token: float
    """On disk."""
    remote: bool
    compressed: bool
    store_mb_s: float
    """Stored bytes that came in per second of waiting wall time, MB/s."""
    working_set_bytes: int
    """Blocks of the shuffle windows that this rank's rows come from, in memory."""
    cache_bytes: int
    first_batch_s: float
    """From nothing opened to the first batch."""
    seek_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds to find the rows of a step, at step 0 and far away, nothing cached."""
    rss_bytes: int = 0

    @property
    def steady_s_per_mtok(self) -> float:
        """CPU seconds for a million tokens when training is under way."""
        once = self.cpu_s_per_mtok["read"] + self.cpu_s_per_mtok["packing"]
        rest = sum(self.cpu_s_per_mtok[part] for part in ("gather", "masking", "ledger"))
        return once * self.reread_factor + rest

    @property
    def steady_mtok_s(self) -> float:
        """Million tokens a second of one core."""
        return 1 / self.steady_s_per_mtok if self.steady_s_per_mtok > 0 else 0.0


@dataclass(frozen=True)
class Need:
    """What the GPUs of a node take."""

    mtok_s: float
    """Million tokens a second of one GPU."""
    gpus_per_node: int = 1
    estimated: bool = False
    """From the table of `planner.gpu_need`, not from a measured run."""
    name: str = "given"


@dataclass(frozen=True)
class Forecast:
    """Whether the loader keeps up with a need."""

    cores_per_gpu: float
    cores_per_node: float
    threads: int
    """data.threads per rank that would be enough."""
    store_mb_s: float
    """Stored bytes a node must read, MB/s."""
    wait_share: float
    """Share of the time that GPUs would wait with `threads` threads, 0 to 1; storage alone can cause it."""
    gpus_per_core: float


def forecast(measured: Measured, need: Need) -> Forecast:
    """Hold what was measured against what is needed."""
    cores = need.mtok_s * measured.steady_s_per_mtok
    threads = max(1, -(-int(cores * 1000) // 1000))
    stored = need.mtok_s * measured.bytes_per_token * measured.reread_factor
    from_store = measured.store_mb_s / (measured.bytes_per_token * measured.reread_factor)
    return Forecast(
        cores_per_gpu=cores,
        cores_per_node=cores * need.gpus_per_node,
        threads=threads,
        store_mb_s=stored * need.gpus_per_node,
        wait_share=wait_share(min(threads * measured.steady_mtok_s, from_store), need.mtok_s),
        gpus_per_core=1 / cores if cores > 0 else float("inf"),
    )


def wait_share(rate: float, need: float) -> float:
    """Share of the time that a consumer of `need` waits for a producer of `rate` that works ahead of it."""
    return max(0.0, 1 - rate / need) if need > 0 else 0.0


def advice(measured: Measured, need: Need | None) -> list[str]:
    """What to change, most useful first; one sentence of praise when there is nothing."""
    found = [*_about_memory(measured), *_about_blocks(measured)]
    if need is not None:
        found = [*_about_need(measured, need), *found]
    if measured.seek_ms.get("far", 0.0) > 300:
        found.append(
            f"finding the rows of a far step takes {measured.seek_ms['far']:.0f} ms: the dataset has very many blocks; "
            f"larger ones ({_better_block(measured):,} tokens) shorten the index"
        )
    return found or ["nothing to change"]


def _about_need(measured: Measured, need: Need) -> list[str]:
    plan = forecast(measured, need)
    said = []
    from_store = measured.store_mb_s / (measured.bytes_per_token * measured.reread_factor)
    if from_store < need.mtok_s:
        said.append(_about_store(measured, need, from_store))
    if plan.threads > 1:
        said.append(
            f"one thread makes {measured.steady_mtok_s:.2f} Mtok/s and a GPU takes {need.mtok_s:.2f}: "
            f"set data.threads={plan.threads} (needs {plan.cores_per_node:.1f} cores a node)"
        )
        slowest = max(PARTS, key=lambda part: measured.cpu_s_per_mtok[part])
        share = measured.cpu_s_per_mtok[slowest] / max(1e-12, sum(measured.cpu_s_per_mtok.values()))
        said.append(f"most of a token's time, {share:.0%}, goes into {slowest}")
    elif from_store >= need.mtok_s:
        said.append(
            f"one core is enough for {_count(plan.gpus_per_core)} of these GPUs; data.threads=1 will do, "
            f"and the {need.gpus_per_node} of a node take {plan.cores_per_node:.2f} cores"
        )
    return said


def _about_store(measured: Measured, need: Need, from_store: float) -> str:
    waiting = wait_share(from_store, need.mtok_s)
    what = f"storage delivers {measured.store_mb_s:.1f} MB/s, enough for {from_store:.2f} Mtok/s of {need.mtok_s:.2f}: "
    if measured.remote:
        keys = (
            "raise data.storage.connections, and set data.storage.cache_dir so that later epochs read from a local disk"
        )
        compress = "" if measured.compressed else "; shards built with --compress zstd are about 0.4 of the size"
        return what + f"GPUs would wait {waiting:.0%} of the time. {keys[0].upper()}{keys[1:]}{compress}"
    return what + f"GPUs would wait {waiting:.0%} of the time. Copy the shards to a faster local disk"


def _about_memory(measured: Measured) -> list[str]:
    if measured.working_set_bytes <= measured.cache_bytes:
        return []
    share = measured.cache_bytes / measured.working_set_bytes
    window = 1 << max(6, int(8192 * share).bit_length() - 1)
    return [
        f"a rank's shuffle windows span {measured.working_set_bytes / 2**20:,.0f} MiB of blocks, data.cache_bytes holds "
        f"{measured.cache_bytes / 2**20:,.0f} MiB, so each block is read about {measured.reread_factor:.1f} times: set "
        f"data.cache_bytes={_rounded_up(measured.working_set_bytes)}, or data.window_rows={window} in a new run"
    ]


def _about_blocks(measured: Measured) -> list[str]:
    said = []
    better = _better_block(measured)
    blocks = measured.cpu_s_per_mtok["read"] + measured.cpu_s_per_mtok["packing"]
    share = blocks / max(1e-12, sum(measured.cpu_s_per_mtok.values()))
    if measured.padding_percent > 1.5 and better > measured.block_tokens * 1.5:
        said.append(
            f"padding is {measured.padding_percent:.1f} % because documents are packed inside blocks of "
            f"{measured.block_tokens:,.0f} tokens: rebuild with --block-tokens {better} for rows of {measured.sequence_length}"
        )
    elif measured.block_tokens < 32768 and share > 0.5:
        said.append(
            f"blocks are small ({measured.block_tokens:,.0f} tokens) and {share:.0%} of the time goes into making them ready: "
            f"rebuild with --block-tokens {better}"
        )
    if (
        measured.compressed
        and not measured.remote
        and measured.cpu_s_per_mtok["read"] > 0.4 * measured.steady_s_per_mtok
    ):
        said.append("unpacking zstd takes most of the reading; on a local disk, shards built without it read faster")
    return said


def _better_block(measured: Measured) -> int:
    """128 rows to a block and 128 Ki tokens at least: padding stays near 1 % (docs/data-format.md)."""
    return max(131072, 1 << (128 * measured.sequence_length - 1).bit_length())


def _rounded_up(size_bytes: int) -> int:
    """To a quarter of a GiB, with a tenth to spare."""
    quarter = 1 << 28
    return -(-int(size_bytes * 1.1) // quarter) * quarter


def _count(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
