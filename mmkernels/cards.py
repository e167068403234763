"""Data sheets of GPUs: what a plan is made for, and what a limit is counted with. Nothing here is measured."""

from __future__ import annotations

from dataclasses import dataclass

# What a step reaches of a data sheet's rates, assumed alike for every way of running it; not measured on any card.
PRODUCT_SHARE = 0.65
BANDWIDTH_SHARE = 0.85
PCIE_4, PCIE_5 = 25e9, 55e9  # bytes a second one way between pinned host memory and the card, 16 lanes, as reached


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU: memory in GiB, bytes a second, dense bfloat16 operations a second with float32 sums in tensor cores.

    device: what the driver calls it; other cards of the family have other memory.
    link_bytes_per_s: to and from the host, each way; 0 where nothing can be moved.
    """

    name: str
    device: str
    memory_gib: float
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float

    def seconds(self, flops: float, num_bytes: float) -> float:
        """Modelled time of an operation: the longer of its products and its traffic, at the shares assumed above."""
        product_s = flops / (self.flops_per_s * PRODUCT_SHARE)
        return max(product_s, num_bytes / (self.bytes_per_s * BANDWIDTH_SHARE))


def _card(name: str, device: str, memory_gib: float, terabytes_per_s: float, teraflops: float, link: float) -> Card:
    return Card(
        name=name, device=device, memory_gib=memory_gib, bytes_per_s=terabytes_per_s * 1e12,
        flops_per_s=teraflops * 1e12, link_bytes_per_s=link,
    )  # fmt: skip


CARDS = (
    _card("A100", "NVIDIA A100-SXM4-80GB", 80, 2.04, 312, PCIE_4),
    _card("A100 40GB", "NVIDIA A100-SXM4-40GB", 40, 1.555, 312, PCIE_4),
    _card("H100", "NVIDIA H100 80GB HBM3", 80, 3.35, 989, PCIE_5),
    _card("H200", "NVIDIA H200", 141, 4.8, 989, PCIE_5),
    _card("L40S", "NVIDIA L40S", 48, 0.864, 362, PCIE_4),
    _card("RTX A6000", "NVIDIA RTX A6000", 48, 0.768, 154.8, PCIE_4),
    _card("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation", 48, 0.96, 364, PCIE_4),
    _card("RTX 5090", "NVIDIA GeForce RTX 5090", 32, 1.792, 209.5, PCIE_5),
    _card("RTX 4090", "NVIDIA GeForce RTX 4090", 24, 1.008, 165.2, PCIE_4),
    _card("RTX 3090", "NVIDIA GeForce RTX 3090", 24, 0.936, 71, PCIE_4),
    _card("RTX 4080", "NVIDIA GeForce RTX 4080", 16, 0.7168, 97.5, PCIE_4),
    _card("RTX 4060 Ti 16GB", "NVIDIA GeForce RTX 4060 Ti", 16, 0.288, 44, PCIE_4 / 2),
)


def card(name: str) -> Card:
    """The card of that name, upper and lower case alike. Raises ValueError with the names that are known."""
    for known in CARDS:
        if name.lower() in (known.name.lower(), known.device.lower()):
            return known
    raise ValueError(f"no card {name!r} is known; give one of {', '.join(known.name for known in CARDS)}")


def card_of(device: str) -> Card | None:
    """The card of a device's name as the driver gives it, or None where its data sheet is not here."""
    return next((known for known in CARDS if known.device == device), None)
