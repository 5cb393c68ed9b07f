"""Machines to plan for: accelerators, links, and user overrides.

Bandwidths are bytes per second in one direction; for NVLink and PCIe, vendors print the sum of both
directions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from megatron_eslm.errors import ConfigError
from megatron_eslm.limits import NOT_NEGATIVE, POSITIVE, Range, check_fields

GB = 1e9
GIB = 2.0**30
US = 1e-6


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One GPU and the machine it usually sits in."""

    peak_flops: float
    """Dense bf16, in FLOP/s."""
    memory_bytes: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    pcie_bandwidth: float
    gpus_per_node: int
    efficiency: float
    """Share of the peak that large matmuls reach in training. Not a vendor's number: fitted to
    published throughputs (planning/published_throughputs.py)."""


# NVIDIA A100 datasheet (June 2021): 312 TFLOPS bf16 dense; 1,555 GB/s (40 GB) and 2,039 GB/s (80
# GB SXM); NVLink 600 GB/s and PCIe Gen4 64 GB/s, both directions together. NVIDIA H100 datasheet:
# 1,979 TFLOPS bf16 with sparsity, half of it dense; 80 GB, 3.35 TB/s; NVLink 900 GB/s, PCIe Gen5
# 128 GB/s. NVIDIA H200 datasheet: the same with 141 GB and 4.8 TB/s. Eight GPUs per machine: DGX
# A100, DGX H100 and HGX H200 datasheets.
ACCELERATORS = {
    "a100-40g": Accelerator(
        peak_flops=312e12,
        memory_bytes=40 * GIB,
        memory_bandwidth=1555 * GB,
        nvlink_bandwidth=300 * GB,
        pcie_bandwidth=32 * GB,
        gpus_per_node=8,
        efficiency=0.77,
    ),
    "a100-80g": Accelerator(
        peak_flops=312e12,
        memory_bytes=80 * GIB,
        memory_bandwidth=2039 * GB,
        nvlink_bandwidth=300 * GB,
        pcie_bandwidth=32 * GB,
        gpus_per_node=8,
        efficiency=0.77,
    ),
    "h100-80g": Accelerator(
        peak_flops=989e12,
        memory_bytes=80 * GIB,
        memory_bandwidth=3350 * GB,
        nvlink_bandwidth=450 * GB,
        pcie_bandwidth=64 * GB,
        gpus_per_node=8,
        efficiency=0.58,
    ),
    "h200-141g": Accelerator(
        peak_flops=989e12,
        memory_bytes=141 * GIB,
        memory_bandwidth=4800 * GB,
        nvlink_bandwidth=450 * GB,
        pcie_bandwidth=64 * GB,
        gpus_per_node=8,
        efficiency=0.58,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network between machines."""

    port_bandwidth: float
    ports: int | None
    """Ports per machine; None: one per GPU."""


# InfiniBand HDR has 200 Gb/s and NDR 400 Gb/s per port (InfiniBand Trade Association, roadmap); one
# port per GPU as in DGX A100 (8 x ConnectX-6) and DGX H100 (8 x ConnectX-7). 100 Gb/s Ethernet
# (IEEE 802.3ba): one port per machine.
NETWORKS = {
    "infiniband-hdr": Network(port_bandwidth=25 * GB, ports=None),
    "infiniband-ndr": Network(port_bandwidth=50 * GB, ports=None),
    "ethernet-100g": Network(port_bandwidth=12.5 * GB, ports=1),
}
DEFAULT_NETWORK = "infiniband-hdr"

INTRA_LINKS = ("nvlink", "pcie")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A protocol of a communication library: its latencies and share of the bandwidth.

    Latencies are in seconds; a hop is a step of a ring or a level of a tree.
    """

    base: float
    """Latency of every collective."""
    hop_intra: float
    hop_inter: float
    tree_hop_intra: float
    tree_hop_inter: float
    bandwidth_share: float


# NCCL 2.2x, src/graph/tuning.cc, which picks by the same formula: baseLat 6.6 and 8.4 us; hwLat
# (LL, Simple) ring NVLink 0.6, 3.4, network 2.7, 14; tree NVLink 0.6, 4, network 5, 14; LL sends 8
# bytes of flags with every 8 bytes and reaches about a quarter of the bandwidth.
NCCL = (
    Protocol(
        base=6.6 * US,
        hop_intra=0.6 * US,
        hop_inter=2.7 * US,
        tree_hop_intra=0.6 * US,
        tree_hop_inter=5.0 * US,
        bandwidth_share=0.25,
    ),
    Protocol(
        base=8.4 * US,
        hop_intra=3.4 * US,
        hop_inter=14.0 * US,
        tree_hop_intra=4.0 * US,
        tree_hop_inter=14.0 * US,
        bandwidth_share=1.0,
    ),
)

LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that collectives reach (tuning.cc caps an A100's NVLink at 235 of
300 GB/s)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything that the cost model knows about a machine."""

    name: str
    peak_flops: float
    efficiency: float
    memory_bytes: float
    memory_bandwidth: float
    intra_bandwidth: float
    """Bandwidth of one device to others in its machine."""
    node_bandwidth: float
    """Bandwidth of one machine to others."""
    gpus_per_node: int
    protocols: tuple[Protocol, ...] = NCCL
    link_efficiency: float = LINK_EFFICIENCY
    usable_memory: float = 0.9
    """Share of the memory that a plan may fill: the rest is for the CUDA context, NCCL's buffers
    and what the allocator cannot use."""
    launch_seconds: float = 6 * US
    """Host time to launch a kernel."""
    host_overlaps: bool = True
    """Whether the host runs ahead of the device (CUDA) or is the device (CPU)."""
    wait_seconds: float = 20 * US
    """Idle time of a device while its host waits for a number and starts launching again."""
    logit_bytes: tuple[float, float] = (0.0, 8.0)
    """Memory traffic of the head per logit, forward and backward, besides its matmuls. The fused
    kernel keeps forward tiles on chip; its backward pass writes and reads gradients once in
    float32. Without it: EAGER_LOGIT_BYTES."""
    hidden_share: float = 0.5
    """Share of ZeRO 3's communication that computing can hide: gathers of the next layers overlap
    with computing (overlap_comm), but each module waits for its own."""
    cores: float | None = None
    """Number of processes that can compute at full speed at once, if they share a processor."""

    @property
    def budget_bytes(self) -> float:
        """Memory that a plan may fill."""
        return self.memory_bytes * self.usable_memory


EAGER_LOGIT_BYTES = (30.0, 36.0)
"""Reads and writes of the unfused head, counted from ops/head/torch_kernel.py and
ops/head/cross_entropy.py: bf16 in, float32 between."""

ASSUMED = (
    "matrix products: {efficiency:.0%} of the peak where they are large (fitted to published "
    "throughputs: --table published), and the time to move their operands through memory besides; "
    "attention's full square counts at the rate of linear layers (its kernels skip half of it and "
    "reach half the rate)",
    "links reach {link_efficiency:.0%} of their bandwidth; collectives as NCCL's rings and trees, "
    "with its latencies; all GPUs of a machine share its network cards",
    "nothing overlaps but the host with its GPU, and {hidden_share:.0%} of ZeRO 3's communication "
    "with computing (DeepSpeed's overlap_comm is on in stage 3 only, unless its JSON sets it)",
    "scores are exchangeable: which rows and tokens are kept is as if drawn at random, and at each "
    "micro-step all ranks wait for the one that has most",
    "{usable_memory:.0%} of the memory can be filled; data is always there in time",
)


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What you know better than the tables of hardware."""

    peak_tflops: Annotated[float, POSITIVE] | None = None
    """Dense peak of a GPU in bf16."""

    memory_gib: Annotated[float, POSITIVE] | None = None
    """Memory of a GPU."""

    efficiency: Annotated[float, Range(above=0, at_most=1, why="a share of the peak")] | None = None
    """Share of the peak that large matrix products reach."""

    intra_gb_per_s: Annotated[float, POSITIVE] | None = None
    """Bandwidth of a GPU to others of its machine, one direction."""

    inter_gb_per_s: Annotated[float, POSITIVE] | None = None
    """Bandwidth of a machine to others, all its ports, one direction."""

    latency_us: Annotated[float, NOT_NEGATIVE] | None = None
    """A message between machines."""

    def __post_init__(self) -> None:
        check_fields(self)


def machine_of(
    gpu: str, interconnect: str, *, intra: str = "nvlink", overrides: Overrides | None = None
) -> Machine:
    """Look up a machine by names from the tables.

    Args:
        gpu: name in ACCELERATORS.
        interconnect: name in NETWORKS.
        intra: nvlink or pcie.
        overrides: numbers to use instead.

    Raises:
        ConfigError: a name is unknown; the message lists the known ones.
    """
    for flag, name, known in (
        ("--gpu", gpu, ACCELERATORS),
        ("--interconnect", interconnect, NETWORKS),
        ("--intra-link", intra, INTRA_LINKS),
    ):
        if name not in known:
            raise ConfigError(
                f"{flag} {name} is not one of {', '.join(known)}. For other hardware, take the "
                "nearest and override its numbers: --peak-tflops, --memory-gib, --efficiency, "
                "--intra-gb-per-s, --inter-gb-per-s, --latency-us."
            )
    a, network, o = ACCELERATORS[gpu], NETWORKS[interconnect], overrides or Overrides()
    ports = network.ports or a.gpus_per_node
    node = o.inter_gb_per_s * GB if o.inter_gb_per_s else network.port_bandwidth * ports
    link = a.nvlink_bandwidth if intra == "nvlink" else a.pcie_bandwidth
    protocols: tuple[Protocol, ...] = NCCL
    if o.latency_us is not None:
        hop = o.latency_us * US
        protocols = tuple(
            dataclasses.replace(p, hop_inter=hop, tree_hop_inter=hop) for p in protocols
        )
    return Machine(
        name=f"{gpu}, {intra}, {interconnect}",
        peak_flops=o.peak_tflops * 1e12 if o.peak_tflops else a.peak_flops,
        efficiency=o.efficiency or a.efficiency,
        memory_bytes=o.memory_gib * GIB if o.memory_gib else a.memory_bytes,
        memory_bandwidth=a.memory_bandwidth,
        intra_bandwidth=o.intra_gb_per_s * GB if o.intra_gb_per_s else link,
        node_bandwidth=node,
        gpus_per_node=a.gpus_per_node,
        protocols=protocols,
    )


def assumptions(machine: Machine) -> list[str]:
    """Assumptions behind predictions for this machine, one sentence each."""
    return [text.format(**dataclasses.asdict(machine)) for text in ASSUMED]
