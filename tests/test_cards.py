"""Data sheets: names as people write them, and times by hand."""

from __future__ import annotations

import pytest

from mmkernels.cards import BANDWIDTH_SHARE, PRODUCT_SHARE, card, card_of


def test_a_card_is_found_by_either_name() -> None:
    assert card("rtx 4090") is card("NVIDIA GeForce RTX 4090") is card_of("NVIDIA GeForce RTX 4090")
    assert card_of("Tesla T4") is None
    with pytest.raises(ValueError, match=r"no card 'T4' is known; give one of A100, .*RTX 4090"):
        card("T4")


def test_an_operation_takes_the_longer_of_its_products_and_its_traffic() -> None:
    a100 = card("A100")
    assert a100.seconds(312e12, 1.0) == pytest.approx(1 / PRODUCT_SHARE)
    assert a100.seconds(1.0, 2.04e12) == pytest.approx(1 / BANDWIDTH_SHARE)
