"""The paper's arithmetic, and ours over its figures."""

from datetime import datetime

import pytest

from kvbuy.economics import (
    EGRESS_PRICES,
    GPU_PRICE,
    LIST_PRICE,
    PAPER_PREFILL_USD,
    PAPER_TOKENS,
    break_even_usd_per_gb,
    egress_usd,
    prefill_usd,
)

PAPER_BYTES = 0.54e9


def test_egress_of_the_papers_artifact_is_the_papers_figure() -> None:
    assert egress_usd(PAPER_BYTES, 0.09) == pytest.approx(0.049, abs=0.0005)


def test_shipping_the_papers_artifact_costs_2_6_times_the_prefill_it_saves() -> None:
    assert pytest.approx(0.01875) == PAPER_PREFILL_USD
    assert egress_usd(PAPER_BYTES, 0.09) / prefill_usd(PAPER_TOKENS, LIST_PRICE) == pytest.approx(2.6, abs=0.05)


def test_the_papers_prefill_price_is_a_list_price_of_4_97_dollars_a_million_tokens() -> None:
    assert LIST_PRICE.usd_per_million_tokens == pytest.approx(4.97, abs=0.005)
    assert "list price" in LIST_PRICE.basis


def test_a_gpu_prefills_the_papers_document_for_4_thousandths_of_a_cent() -> None:
    assert prefill_usd(PAPER_TOKENS, GPU_PRICE) == pytest.approx(4.2e-5, rel=0.01)
    assert "4 B parameters, 2 FLOP a parameter and token, 500 TFLOP/s at $2.50 an hour" in GPU_PRICE.basis


def test_shipping_and_prefill_cost_the_same_at_the_break_even() -> None:
    prefill = prefill_usd(PAPER_TOKENS, LIST_PRICE)
    price = break_even_usd_per_gb(prefill, PAPER_BYTES)
    assert price == pytest.approx(0.0347, abs=0.0001)
    assert egress_usd(PAPER_BYTES, price) == pytest.approx(prefill)


def test_a_gigabyte_is_a_thousand_million_bytes() -> None:
    assert egress_usd(1_000_000_000, 0.09) == 0.09


def test_every_price_is_dated_and_has_a_source() -> None:
    for price in EGRESS_PRICES:
        assert datetime.strptime(price.date, "%Y-%m")
        assert price.source
    assert [price.provider for price in EGRESS_PRICES if not price.secondary] == ["Cloudflare R2", "Hugging Face"]
