"""GPUs: their data sheets, what kinds of kernels reach of them, and the memory that a training step really gets.

The rates of the H200 were measured on one (driver 580, torch 2.11 for CUDA 13.0): products by one of 8192^3, passes by
a copy, attention and convolutions by fits over several sizes, the rest as the bytes that the trace counts for a kind
over the GPU time that torch.profiler gave its kernels in a step of selective checkpointing.

An H100 has the H200's processor and less fast memory. Its products, passes, attention and convolutions were measured
as well; its other kinds are the H200's, as long as a pass over its own memory is no slower: what the memory did not
bound there is no slower here (a fused step took 2.62 s there and 2.59 here). Those of every other card are **assumed**:
the H200's share of its data sheet, of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

PCIE_4, PCIE_5 = 25e9, 55e9  # bytes a second one way between pinned host memory and the card, 16 lanes, as reached
# What a step cannot allocate of the memory that CUDA reports, GiB.
CONTEXT_GIB = 0.5  # CUDA's context and loaded kernels: 0.2 to 0.5 in seven users' out-of-memory messages
# Of what the allocator may hold: free, but in pieces that are too small, expandable segments on. Steps ran with 3.1%
# (22.6 GiB of an H100) and 1.9% (all of it) left beside what they held, and ran out with 1.7% (139.2 GiB of an H200),
# 1.4% (22.6) and 1.1% (24).
FRAGMENTS = 0.03
DISPLAY_GIB = 0.4  # a desktop on the same card; assumed
# product: cuBLAS. flash: FlashAttention-2, as torch carries it. attention: what scaled_dot_product_attention takes.
# pass: reads and writes in one order and of one dtype, or narrows it. widening: to a larger dtype. strided: of several
# orders, or broadcast. reduction: sums and norms but group norm's forward. kernel: ours, which torch does not dispatch.
Kind = Literal[
    "product", "convolution", "flash", "flash backward", "attention", "attention backward", "pass", "widening",
    "strided", "reduction", "group norm", "kernel",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What kernels of one kind reach, where each is large: operations a second, bytes a second; what each starts with.

    A kernel takes start_s + sqrt((flops / flops_per_s)^2 + (bytes / bytes_per_s)^2): products and traffic overlap, but
    not wholly where both take as long.
    """

    bytes_per_s: float
    flops_per_s: float = math.inf
    start_s: float = 2e-6  # assumed: from one kernel's last block to the next one's first

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Of one kernel; none where there is nothing to do."""
        if not flops and not num_bytes:
            return 0.0
        return self.start_s + math.hypot(flops / self.flops_per_s, num_bytes / self.bytes_per_s)

    def faster(self, factor: float) -> Rate:
        """Both rates times a factor."""
        return replace(self, flops_per_s=factor * self.flops_per_s, bytes_per_s=factor * self.bytes_per_s)


H200_SHEET = (4.8e12, 989e12)  # bytes and operations a second, which the shares of every other card are counted from
H200_RATES: Mapping[Kind, Rate] = {
    "product": Rate(flops_per_s=755e12, bytes_per_s=3.9e12),
    # over 30 timings of 3, 12 and 72 frames: 9% root mean square
    "convolution": Rate(flops_per_s=670e12, bytes_per_s=3.9e12, start_s=78e-6),
    # over 9216, 2304 and 576 pixels: 5% at most
    "flash": Rate(flops_per_s=300e12, bytes_per_s=0.85e12),
    "flash backward": Rate(flops_per_s=295e12, bytes_per_s=0.4e12),
    "attention": Rate(flops_per_s=460e12, bytes_per_s=1.15e12),  # cuDNN's
    "attention backward": Rate(flops_per_s=435e12, bytes_per_s=0.8e12),
    "pass": Rate(bytes_per_s=4.2e12),
    "widening": Rate(bytes_per_s=2.0e12),
    "strided": Rate(bytes_per_s=1.48e12),
    "reduction": Rate(bytes_per_s=1.9e12),
    "group norm": Rate(bytes_per_s=0.59e12),  # one block of threads to a group and clip
    "kernel": Rate(bytes_per_s=2.2e12),
}
"""Measured."""
_H100_PASS = Rate(bytes_per_s=2.98e12)
H100_RATES: Mapping[Kind, Rate] = {
    **{kind: replace(x, bytes_per_s=min(x.bytes_per_s, _H100_PASS.bytes_per_s)) for kind, x in H200_RATES.items()},
    "product": Rate(flops_per_s=785e12, bytes_per_s=2.98e12),
    # over 45 timings of 3 to 72 frames: 9% root mean square
    "convolution": Rate(flops_per_s=760e12, bytes_per_s=2.98e12, start_s=62e-6),
    # over 9216, 2304 and 576 pixels: 3% at most
    "flash": Rate(flops_per_s=320e12, bytes_per_s=0.95e12),
    "flash backward": Rate(flops_per_s=295e12, bytes_per_s=0.5e12),
    "attention": Rate(flops_per_s=500e12, bytes_per_s=1.15e12),
    "attention backward": Rate(flops_per_s=475e12, bytes_per_s=0.75e12),
    "pass": _H100_PASS,
}
"""Measured on one H100 (torch 2.11 for CUDA 13.0), and the rest by the rule above."""
# Of the operations of a data sheet before Hopper, whose tensor cores FlashAttention-2 was written for: 50 to 73% on an
# A100 (Dao 2023, arXiv 2307.08691); its forward is nearer the upper end.
FLASH_SHARES: Mapping[Kind, float] = {"flash": 0.6, "flash backward": 0.5, "attention": 0.6, "attention backward": 0.5}
HOPPER = (9, 0)
LARGEST_WORKSPACE_BYTES = 32 << 20  # of cuBLAS, on Hopper


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the cards of one host: bytes a second that each sends while it receives as many, as NCCL reaches them.

    start_s: from the call of a collective to its first byte. source: where both are from, or "assumed".
    """

    name: str
    bytes_per_s: float
    start_s: float
    source: str

    def seconds(self, sent_bytes: float) -> float:
        """Of one collective in which each card sends so much."""
        return self.start_s + sent_bytes / self.bytes_per_s if sent_bytes else 0.0


# By the data sheets 450 and 300 GB/s one way. All-reduces of eight H100 gain from sums in the switch (480 GB/s counted
# as a ring's), which is left out. Start of a collective: assumed on NVLink.
NVLINK_4 = Link(
    name="NVLink 4, through switches", bytes_per_s=370e9, start_s=25e-6,
    source="effective bandwidth by NCCL's maintainer, NVIDIA/nccl-tests #212; start assumed",
)  # fmt: skip
NVLINK_3 = Link(
    name="NVLink 3, through switches", bytes_per_s=230e9, start_s=25e-6,
    source="8 A100 SXM4 reach 230 to 250 GB/s in all-reduces (docs.alayanew.com, nccl-tests); start assumed",
)  # fmt: skip
# GeForce drivers allow no copies between cards: each goes through the host's memory. 25.8 GB/s both ways together
# between any two of three RTX 4090 in 16 lanes of PCIe 4. Of eight the host's memory may give less.
PCIE_4_HOST = Link(
    name="PCIe 4 x16, through the host", bytes_per_s=12.9e9, start_s=42e-6,
    source="tinygrad/open-gpu-kernel-modules #6, P2P disabled; start NVIDIA/nccl #1530; more than three cards assumed",
)  # fmt: skip


PEERS_NOT_KNOWN = replace(PCIE_4_HOST, name="a link that is not known", source="assumed: as of PCIe 4 through the host")


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU: bytes a second, dense bfloat16 operations a second with float32 sums in tensor cores, of its data sheet.

    device: what the driver calls it; other cards of the family have other memory.
    memory_gib: by its name. usable_gib: of it, what a step may allocate; unbounded where nothing is known.
    link_bytes_per_s: to and from the host, each way; 0 where nothing can be moved.
    peers: what joins several of them in one host; None where it is not known.
    rates: measured ones; those that are not in it are assumed from the data sheet.
    """

    name: str
    device: str
    memory_gib: float
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    capability: tuple[int, int] = (8, 0)
    usable_gib: float = math.inf
    peers: Link | None = None
    rates: Mapping[Kind, Rate] = field(default_factory=dict, hash=False)

    def rate(self, kind: Kind) -> Rate:
        """Measured where it was, else the share that an H200 reaches of its data sheet, of this one's."""
        if (known := self.rates.get(kind)) is not None:
            return known
        model, (sheet_bytes, sheet_flops) = H200_RATES[kind], H200_SHEET
        flops_share = model.flops_per_s / sheet_flops
        if self.capability < HOPPER:
            flops_share = FLASH_SHARES.get(kind, flops_share)
        return Rate(
            flops_per_s=flops_share * self.flops_per_s, start_s=model.start_s,
            bytes_per_s=model.bytes_per_s / sheet_bytes * self.bytes_per_s,
        )  # fmt: skip

    def seconds(self, flops: float, num_bytes: float, kind: Kind = "pass") -> float:
        """Modelled time of one kernel."""
        return self.rate(kind).seconds(flops, num_bytes)

    @property
    def joined(self) -> Card:
        """With a link to its peers, an assumed one where none is known."""
        return self if self.peers is not None else replace(self, peers=PEERS_NOT_KNOWN)

    @property
    def workspace_bytes(self) -> int:
        """Of cuBLAS, for each thread that calls it (getChosenWorkspaceSize in torch's CublasHandlePool.cpp).

        cublasLt's lies in the same memory.
        """
        return LARGEST_WORKSPACE_BYTES if self.capability == HOPPER else (8 << 20) + (128 << 10)


def without_fragments(gib: float) -> float:
    """What a step can hold of so much memory."""
    return gib * (1 - FRAGMENTS)


def _usable(reported_gib: float) -> float:
    """What a step may allocate, in GiB, of what CUDA says there is, as in a message that memory ran out."""
    return round(without_fragments(reported_gib - CONTEXT_GIB), 1)


# Reported memory is from users' messages: A100 79.25 (levihsu/OOTDiffusion #235), its 40 GB 39.50 (TianheWu/CoSeR
# #10), L40S 44.42 (stepfun-ai/Step-Video-T2V #8), A6000 47.54 (google-research/semivl #18), 6000 Ada 44.43 with ECC
# (DINGYANB/MTVCrafter #21), RTX 4090 23.64 and 23.52 (ali-vilab/VGen #104, Soul-AILab/SoulX-FlashTalk #5), a card of
# 16 GB 15.61 (DengKaiCQ/VGGT-Long #6); H200 and H100 (79.18) measured. RTX 5090, 3090: assumed, by cards of the same
# size.
CARDS = (
    Card(name="A100", device="NVIDIA A100-SXM4-80GB", memory_gib=80, usable_gib=_usable(79.2),
         bytes_per_s=2.04e12, flops_per_s=312e12, link_bytes_per_s=PCIE_4, capability=(8, 0), peers=NVLINK_3),
    Card(name="A100 40GB", device="NVIDIA A100-SXM4-40GB", memory_gib=40, usable_gib=_usable(39.5),
         bytes_per_s=1.555e12, flops_per_s=312e12, link_bytes_per_s=PCIE_4, capability=(8, 0), peers=NVLINK_3),
    Card(name="H100", device="NVIDIA H100 80GB HBM3", memory_gib=80, usable_gib=_usable(79.1), capability=HOPPER,
         bytes_per_s=3.35e12, flops_per_s=989e12, link_bytes_per_s=PCIE_5, rates=H100_RATES, peers=NVLINK_4),
    Card(name="H200", device="NVIDIA H200", memory_gib=141, usable_gib=_usable(139.8), capability=HOPPER,
         bytes_per_s=4.8e12, flops_per_s=989e12, link_bytes_per_s=PCIE_5, rates=H200_RATES, peers=NVLINK_4),
    Card(name="L40S", device="NVIDIA L40S", memory_gib=48, usable_gib=_usable(44.4),
         bytes_per_s=0.864e12, flops_per_s=362e12, link_bytes_per_s=PCIE_4, capability=(8, 9)),
    Card(name="RTX A6000", device="NVIDIA RTX A6000", memory_gib=48, usable_gib=_usable(47.5 - DISPLAY_GIB),
         bytes_per_s=0.768e12, flops_per_s=154.8e12, link_bytes_per_s=PCIE_4, capability=(8, 6)),
    Card(name="RTX 6000 Ada", device="NVIDIA RTX 6000 Ada Generation", memory_gib=48,
         usable_gib=_usable(44.4 - DISPLAY_GIB),
         bytes_per_s=0.96e12, flops_per_s=364e12, link_bytes_per_s=PCIE_4, capability=(8, 9)),
    Card(name="RTX 5090", device="NVIDIA GeForce RTX 5090", memory_gib=32, usable_gib=_usable(31.3 - DISPLAY_GIB),
         bytes_per_s=1.792e12, flops_per_s=209.5e12, link_bytes_per_s=PCIE_5, capability=(12, 0)),
    Card(name="RTX 4090", device="NVIDIA GeForce RTX 4090", memory_gib=24, usable_gib=_usable(23.5 - DISPLAY_GIB),
         bytes_per_s=1.008e12, flops_per_s=165.2e12, link_bytes_per_s=PCIE_4, capability=(8, 9), peers=PCIE_4_HOST),
    Card(name="RTX 3090", device="NVIDIA GeForce RTX 3090", memory_gib=24, usable_gib=_usable(23.5 - DISPLAY_GIB),
         bytes_per_s=0.936e12, flops_per_s=71e12, link_bytes_per_s=PCIE_4, capability=(8, 6)),
    Card(name="RTX 4080", device="NVIDIA GeForce RTX 4080", memory_gib=16, usable_gib=_usable(15.6 - DISPLAY_GIB),
         bytes_per_s=0.7168e12, flops_per_s=97.5e12, link_bytes_per_s=PCIE_4, capability=(8, 9)),
    Card(name="RTX 4060 Ti 16GB", device="NVIDIA GeForce RTX 4060 Ti", memory_gib=16,
         usable_gib=_usable(15.6 - DISPLAY_GIB),
         bytes_per_s=0.288e12, flops_per_s=44e12, link_bytes_per_s=PCIE_4 / 2, capability=(8, 9)),
)  # fmt: skip


def card(name: str) -> Card:
    """The card of that name, as `find_card` finds it. Raises ValueError with the names that are known."""
    if (known := find_card(name)) is not None:
        return known
    raise ValueError(f"no card {name!r} is known; give one of {', '.join(known.name for known in CARDS)}")


def find_card(name: str) -> Card | None:
    """The card of a name, ours or the driver's, upper and lower case alike; None where its data sheet is not here."""
    return next((known for known in CARDS if name.lower() in (known.name.lower(), known.device.lower())), None)
