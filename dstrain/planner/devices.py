"""The accelerators a plan knows: peaks, memory and links from data sheets, and which share of them real kernels reach.

Peaks are dense, without sparsity. A share says where it was measured; `assumed` means nobody measured it here or in a source we could
read, and a probe of the real device (`dstrain plan --probe`) is better. Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.base.errors import ConfigError

_TERA = 1e12
_GIBI = 2**30


@dataclass(frozen=True)
class Curve:
    """A rate that grows with a size and levels off: ceiling · x / (x + half)."""

    ceiling: float
    """FLOP/s that large sizes tend to."""
    half: float
    """The size at which half of it is reached."""

    def rate(self, size: float) -> float:
        """FLOP/s at a size."""
        return self.ceiling * size / (size + self.half)


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU core."""

    name: str
    """As `--gpu-type` takes it."""
    title: str
    peak_flops: float
    """Dense bf16 peak, FLOP/s; fp16 where the device has no bf16."""
    single_flops: float
    """fp32 peak as torch uses it by default (no TF32), FLOP/s."""
    memory_bytes: int
    """What a process can allocate of it, bytes: about 1 GiB less than its name says on most boards."""
    bandwidth: float
    """Memory bandwidth that mixed elementwise kernels reach, bytes/s."""
    link_bandwidth: float
    """What one rank sends in a ring inside a node, bytes/s, as achieved (bus bandwidth), not as advertised."""
    power_w: float
    """Of the board under load, W; hosts and cooling come on top (`prices.yaml`)."""
    gemm: Curve
    """Matrix products in half precision, by the smaller of their widths."""
    attention: Curve
    """Flash attention of head width 64, forward and backward, by the tokens a token attends to."""
    launch_s: float = 6e-6
    """Least time of a kernel that Python launches: what small work is bound by."""
    is_gpu: bool = True
    source: str = ""
    """Where the numbers come from."""


_BANDWIDTH_SHARE = 0.78
"""Of the data sheet's bandwidth: 2.6 TB/s on an H100, whose plain copies reach 3.0 of 3.35."""


def _gpu(
    name: str, title: str, peak: float, single: float, gigabytes: float, bandwidth: float, link: float, power: float,
    source: str, *, gemm: float = 0.80, width: float = 256, attention: float = 0.27,
) -> Device:  # fmt: skip
    """From TFLOP/s, GB of memory that can be used, TB/s, GB/s, W, and shares of the peak.

    `width` is the half size of matrix products: 256 fits the H100 (600 to 690 TFLOP/s at widths of 768 to 1,024, 798 at 8,192); the others
    follow from their peak for each multiprocessor, which is what a narrow product cannot feed.
    """
    return Device(
        name=name, title=title, peak_flops=peak * _TERA, single_flops=single * _TERA,
        memory_bytes=round(gigabytes * _GIBI), bandwidth=bandwidth * _BANDWIDTH_SHARE * _TERA, link_bandwidth=link * 1e9,
        power_w=power, gemm=Curve(gemm * peak * _TERA, width), attention=Curve(attention * peak * _TERA, 222), source=source,
    )  # fmt: skip


_ASSUMED = "NVIDIA data sheet; shares assumed"
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("v100", "NVIDIA V100 SXM2 32 GB", 125, 15.7, 31.7, 0.90, 120, 300, width=64, attention=0.20,
             source="NVIDIA V100 data sheet (fp16 tensor peak; no bf16); shares assumed"),
        _gpu("a100-40", "NVIDIA A100 SXM4 40 GB", 312, 19.5, 39.4, 1.555, 235, 400, gemm=0.85, width=128, attention=0.50,
             source="NVIDIA A100 data sheet; GEMM 0.85 and all-reduce 235 GB/s from ml-engineering; attention from the "
             "FlashAttention-2 paper (arXiv 2307.08691)"),
        _gpu("a100", "NVIDIA A100 SXM4 80 GB", 312, 19.5, 79.3, 2.039, 235, 400, gemm=0.85, width=128, attention=0.50,
             source="as a100-40"),
        _gpu("h100", "NVIDIA H100 SXM5 80 GB", 989, 67, 79.1, 3.35, 363, 700, gemm=0.807,
             source="NVIDIA H100 data sheet; GEMM 798 TFLOP/s at 8192^3 and 3.0 TB/s copy measured on an H100 80GB HBM3; "
             "ring collectives 361-367 GB/s published for 8 H200; attention from the FlashAttention-3 charts (FA2 lines)"),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 989, 67, 139.8, 4.8, 363, 700, gemm=0.807,
             source="NVIDIA H200 data sheet; shares of the H100"),
        _gpu("b200", "NVIDIA B200 SXM 180 GB", 2250, 80, 178.0, 7.7, 700, 1000, gemm=0.776, width=512,
             source="NVIDIA HGX B200 data sheet; GEMM share from ml-engineering; links assumed"),
        _gpu("mi300x", "AMD MI300X 192 GB", 1307, 163, 191.0, 5.3, 300, 750, gemm=0.58, width=128,
             source="AMD MI300X data sheet; GEMM share from ml-engineering; links assumed"),
        _gpu("l40s", "NVIDIA L40S 48 GB", 362, 91.6, 44.4, 0.864, 20, 350, width=96, source=f"{_ASSUMED}; no NVLink"),
        _gpu("4090", "NVIDIA RTX 4090 24 GB", 165, 82.6, 23.5, 1.008, 10, 450, width=64, attention=0.50,
             source=f"{_ASSUMED}; fp16 peak with fp32 accumulation; no NVLink, no direct transfers"),
        Device("cpu", "one core of an x86 server CPU with AVX2", 0.08e12, 0.08e12, 8 * _GIBI, 6e9, 2e9, 15,
               gemm=Curve(0.05e12, 32), attention=Curve(0.02e12, 32), launch_s=10e-6, is_gpu=False,
               source="assumed; run --probe, CPUs differ by ten times"),
    )
}  # fmt: skip
"""Every device by its name."""


def find_device(name: str) -> Device:
    """The device of a name.

    Raises:
        ConfigError: not in the table.
    """
    found = DEVICES.get(name.lower())
    if found is None:
        raise ConfigError(
            f"--gpu-type: {name}: not in the table ({', '.join(DEVICES)}): give one of these, or measure the device itself with "
            "`dstrain plan --probe`"
        )
    return found


@dataclass(frozen=True)
class Interconnect:
    """What joins nodes."""

    name: str
    title: str
    gpu_bandwidth: float
    """Bytes/s that one GPU can send to another node; a network card for each GPU unless the title says otherwise."""
    shared: bool
    """Whether the GPUs of a node share the bandwidth."""
    latency_s: float
    """Of one message between nodes."""
    achieved: float = 0.85
    """Share that collectives reach; 80 to 90 % are published for NCCL over InfiniBand."""


def _per_gpu(name: str, gigabits: float, title: str, latency_us: float, achieved: float = 0.85) -> Interconnect:
    return Interconnect(name, title, gigabits * 1e9 / 8, False, latency_us * 1e-6, achieved)


def _per_node(name: str, gigabits: float, title: str, latency_us: float, achieved: float) -> Interconnect:
    return Interconnect(name, title, gigabits * 1e9 / 8, True, latency_us * 1e-6, achieved)


INTERCONNECTS: dict[str, Interconnect] = {
    link.name: link
    for link in (
        _per_gpu("ib800", 800, "InfiniBand XDR, 800 Gb/s for each GPU", 5),
        _per_gpu("ib400", 400, "InfiniBand NDR, 400 Gb/s for each GPU", 5),
        _per_gpu("ib200", 200, "InfiniBand HDR, 200 Gb/s for each GPU", 5),
        _per_gpu("ib100", 100, "InfiniBand EDR, 100 Gb/s for each GPU", 6),
        _per_gpu("roce400", 400, "RoCE Ethernet, 400 Gb/s for each GPU", 8, 0.80),
        _per_gpu("efa400", 400, "AWS EFA, 400 Gb/s for each GPU (p5)", 15, 0.70),
        _per_gpu("efa50", 50, "AWS EFA, 400 Gb/s for each node of 8 (p4d)", 15, 0.70),
        _per_node("ib-node-100", 100, "InfiniBand EDR, 100 Gb/s for each node", 6, 0.85),
        _per_node("eth100", 100, "Ethernet, 100 Gb/s for each node, TCP", 30, 0.70),
        _per_node("eth25", 25, "Ethernet, 25 Gb/s for each node, TCP", 30, 0.80),
        _per_node("eth10", 10, "Ethernet, 10 Gb/s for each node, TCP", 40, 0.85),
    )
}
"""Every interconnect by its name."""


def find_interconnect(name: str) -> Interconnect:
    """The interconnect of a name.

    Raises:
        ConfigError: not in the table.
    """
    found = INTERCONNECTS.get(name.lower())
    if found is None:
        raise ConfigError(f"--interconnect: {name}: not in the table: give one of {', '.join(INTERCONNECTS)}")
    return found
