"""Cards: names as people write them, what they leave a step, and rates held to what an H200 measured."""

from __future__ import annotations

import math

import pytest

from mmkernels.cards import (
    CARDS,
    CONTEXT_GIB,
    DISPLAY_GIB,
    FRAGMENTS,
    H200_RATES,
    Kind,
    Rate,
    card,
    find_card,
    without_fragments,
)

MEASURED_MS: dict[Kind, dict[tuple[float, float], float]] = {  # by (FLOPs, bytes), on an H200, by CUDA events
    "product": {(2 * 8192**3, 3 * 2 * 8192**2): 1.456},
    "pass": {(0, 2 * 405 * 2**20): 0.217},
}
PICTURES = 128 * 72, 64 * 36, 32 * 18
CONVOLUTION_MS = (  # 3x3: channels in and out, pixels, frames; forward, data, weights
    (320, 320, PICTURES[0], 3, (0.132, 0.128, 0.172)),
    (320, 320, PICTURES[0], 12, (0.371, 0.370, 0.416)),
    (320, 320, PICTURES[0], 72, (1.922, 1.902, 2.215)),
    (640, 320, PICTURES[0], 3, (0.255, 0.239, 0.236)),
    (640, 320, PICTURES[0], 12, (0.767, 0.705, 0.827)),
    (640, 320, PICTURES[0], 72, (3.669, 3.399, 3.886)),
    (640, 640, PICTURES[1], 12, (0.409, 0.437, 0.379)),
    (640, 640, PICTURES[1], 72, (1.690, 1.781, 1.884)),
    (1280, 1280, PICTURES[2], 12, (0.397, 0.405, 0.411)),
    (1280, 1280, PICTURES[2], 72, (1.725, 1.732, 1.797)),
)
ATTENTION_MS: dict[Kind, tuple[float, float, float]] = {  # 72 frames of 9216, 2304, 576 pixels, 5, 10, 20 heads of 64
    "flash": (25.694, 3.511, 0.638),
    "flash backward": (66.775, 9.508, 2.247),
    "attention": (17.415, 2.175, 0.465),
    "attention backward": (44.882, 6.064, 1.286),
}

H100_TERAFLOPS = {  # 3x3, by channels and frames, on an H100: forward, data, weights
    (320, 3): (402, 341, 327), (320, 6): (512, 470, 473), (320, 12): (594, 589, 522), (320, 24): (634, 633, 563),
    (320, 72): (673, 679, 591), (640, 3): (358, 398, 484), (640, 6): (479, 528, 555), (640, 12): (690, 683, 677),
    (640, 24): (745, 730, 713), (640, 72): (800, 775, 742), (1280, 3): (400, 389, 474), (1280, 6): (550, 548, 560),
    (1280, 12): (655, 542, 664), (1280, 24): (670, 640, 698), (1280, 72): (812, 807, 751),
}  # fmt: skip
H100_ATTENTION_MS: dict[Kind, tuple[float, float, float]] = {  # as above; of 9216 pixels 24 frames
    "flash": (8.213, 3.171, 0.597),
    "flash backward": (22.232, 9.062, 1.945),
    "attention": (5.302, 2.085, 0.442),
    "attention backward": (13.667, 5.723, 1.299),
}


def test_a_card_is_found_by_either_name() -> None:
    assert card("rtx 4090") is card("NVIDIA GeForce RTX 4090") is find_card("NVIDIA GeForce RTX 4090")
    assert find_card("Tesla T4") is None
    with pytest.raises(ValueError, match=r"no card 'T4' is known; give one of A100, .*RTX 4090"):
        card("T4")


def test_products_and_traffic_overlap_but_where_both_take_as_long() -> None:
    rate = Rate(flops_per_s=1e9, bytes_per_s=1e6, start_s=1.0)
    assert rate.seconds(3e9, 4e6) == pytest.approx(1 + 5)
    assert rate.seconds(3e9, 0) == pytest.approx(1 + 3) and rate.seconds(0, 0) == 0
    assert rate.faster(2).seconds(3e9, 4e6) == pytest.approx(1 + 2.5)


def test_an_h200_takes_what_was_measured_on_one() -> None:
    h200 = card("H200")
    for kind, times in MEASURED_MS.items():
        for work, measured_ms in times.items():
            assert h200.seconds(*work, kind) * 1e3 == pytest.approx(measured_ms, rel=0.07), kind
    for kind, (flops_factor, tensors) in {
        "flash": (4, 4), "flash backward": (10, 8), "attention": (4, 4), "attention backward": (10, 8),
    }.items():  # fmt: skip
        for pixels, heads, measured_ms in zip(PICTURES, (5, 10, 20), ATTENTION_MS[kind], strict=True):  # pyright: ignore[reportArgumentType]
            rows = 72 * heads * pixels * 64
            found_ms = h200.seconds(flops_factor * rows * pixels, 2 * tensors * rows, kind) * 1e3  # pyright: ignore[reportArgumentType]
            assert found_ms == pytest.approx(measured_ms, rel=0.06), (kind, pixels)
    errors = []
    for channels, out, pixels, frames, times_ms in CONVOLUTION_MS:
        flops, num_bytes = 18 * channels * out * pixels * frames, 2 * (channels + out) * pixels * frames
        found_ms = h200.seconds(flops, num_bytes, "convolution") * 1e3
        errors += [math.log(found_ms / measured_ms) for measured_ms in times_ms]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.095


def test_an_h100_takes_what_was_measured_on_one() -> None:
    h100, errors = card("H100"), []
    assert h100.seconds(2 * 8192**3, 3 * 2 * 8192**2, "product") == pytest.approx(1.400e-3, rel=0.03)
    assert h100.seconds(0, 2 * 2**30, "pass") == pytest.approx(2 * 2**30 / 2.978e12, rel=0.01)
    for kind, times in H100_ATTENTION_MS.items():
        flops_factor, tensors = (10, 8) if "backward" in kind else (4, 4)
        for pixels, heads, frames, measured_ms in zip(PICTURES, (5, 10, 20), (24, 72, 72), times, strict=True):
            rows = frames * heads * pixels * 64
            found_s = h100.seconds(flops_factor * rows * pixels, 2 * tensors * rows, kind)
            assert found_s * 1e3 == pytest.approx(measured_ms, rel=0.03), (kind, pixels)
    for (channels, frames), teraflops in H100_TERAFLOPS.items():
        pixels = PICTURES[(320, 640, 1280).index(channels)]
        flops, num_bytes = 18 * channels**2 * pixels * frames, 4 * channels * pixels * frames
        found_s = h100.seconds(flops, num_bytes, "convolution")
        errors += [math.log(found_s / (flops / each / 1e12)) for each in teraflops]
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) < 0.095
    for kind, rate in H200_RATES.items():  # what was not measured: the H200's, but not above a pass over its memory
        if kind not in ("product", "convolution", "pass", *H100_ATTENTION_MS):
            assert h100.rate(kind) == rate and rate.bytes_per_s < 2.98e12


def test_rates_of_another_card_are_its_data_sheets_by_the_h200s_share() -> None:
    h200, l40s, ampere = card("H200"), card("L40S"), card("A100")
    share = l40s.flops_per_s / h200.flops_per_s
    assert l40s.rate("product").flops_per_s == pytest.approx(755e12 * share)
    assert l40s.rate("strided").bytes_per_s == pytest.approx(1.48e12 * 0.864 / 4.8)
    assert ampere.rate("flash").flops_per_s == pytest.approx(0.6 * 312e12)  # FlashAttention-2 was written for it
    assert ampere.rate("attention").flops_per_s == pytest.approx(0.6 * 312e12)
    assert ampere.workspace_bytes < h200.workspace_bytes == 32 << 20


def test_what_a_card_leaves_a_step() -> None:
    assert card("RTX 4090").usable_gib == pytest.approx((23.5 - CONTEXT_GIB - DISPLAY_GIB) * (1 - FRAGMENTS), abs=0.05)
    assert card("A100").usable_gib == pytest.approx((79.2 - CONTEXT_GIB) * (1 - FRAGMENTS), abs=0.05)
    # GiB that the allocator had, and that steps held or would have: what ran fits, what ran out does not.
    assert all(held < without_fragments(had) for had, held in ((22.6, 21.89),))
    assert all(held > without_fragments(had) for had, held in ((139.2, 136.9), (22.6, 22.28), (24, 23.73)))
    for each in CARDS:
        assert 0.86 * each.memory_gib < each.usable_gib < each.memory_gib - 0.8, each.name
