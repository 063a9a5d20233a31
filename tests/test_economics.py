"""The arithmetic of what KV is worth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbuy.economics import (
    Case,
    break_even_gbps,
    break_even_loads,
    break_even_tokens,
    break_even_usd_per_gb,
    count_costs,
    egress_usd,
    gpu_usd,
    hosting_pays_from,
    shipping_beats_hosting_below,
    shipping_beats_prefill_below,
    tokens_usd,
    transfer_seconds,
)

CASE = Case(
    tokens=1000,
    kv_bytes=2e9,
    prefill_usd=1.0,
    ratio=10.0,
    loads=100,
    usd_per_gb=0.05,
    usd_per_gb_hour=0.25,
    usd_per_fetch=0.01,
    store_usd_per_gb_hour=0.125,
    store_usd_per_fetch=0.02,
    hours=4,
    input_usd=2000.0,
    write_usd=300.0,
    read_usd=200.0,
    publisher_share=0.25,
)


def change(case: Case, **fields: float) -> Case:
    from dataclasses import replace

    return replace(case, **fields)  # type: ignore[arg-type]


def test_every_way_is_counted_with_its_parts() -> None:
    costs = count_costs(CASE)
    assert costs.prefill == 100
    assert costs.ship == pytest.approx(1 + 100 * (0.1 + 0.1 + 0.02) + 2 * 0.125 * 4)
    assert costs.ship_once == pytest.approx(1 + 100 * 0.1 + 0.1 + 0.02 + 2 * 0.125 * 4)
    assert costs.host == pytest.approx(1 + 100 * (0.1 + 0.01) + 2 * 0.25 * 4)
    assert (costs.uncached, costs.tariff) == pytest.approx((200, 0.3 + 99 * 0.2))
    assert costs.margin == pytest.approx(6.1)
    assert (costs.publisher, costs.provider) == pytest.approx((1.525, 4.575))
    assert costs.cheapest == "host"


def test_a_publisher_pays_for_no_loss() -> None:
    costs = count_costs(change(CASE, read_usd=0, write_usd=0))
    assert costs.publisher == 0
    assert costs.provider == costs.margin == -costs.host


def test_one_load_is_cheapest_prefilled() -> None:
    assert count_costs(change(CASE, loads=1)).cheapest == "prefill"


def test_free_egress_wins_only_where_the_store_is_cheaper_than_hosting() -> None:
    free = change(CASE, usd_per_gb=0, store_usd_per_fetch=0)
    assert count_costs(free).cheapest == "ship"
    assert count_costs(change(free, store_usd_per_gb_hour=2.0)).cheapest == "host"


def test_break_even_loads_are_about_one_for_a_high_ratio() -> None:
    assert break_even_loads(change(CASE, ratio=49.7)) == pytest.approx(1.0205, abs=1e-4)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_reuse_that_is_not_faster_never_pays(ratio: float) -> None:
    slow = change(CASE, ratio=ratio)
    assert (break_even_loads(slow), hosting_pays_from(slow)) == (None, None)
    assert shipping_beats_prefill_below(slow) == 0


POSITIVE = st.floats(0.01, 1e4)


@given(POSITIVE, st.floats(1.01, 1000), st.floats(2, 1e9), POSITIVE)
def test_hosting_and_prefill_cost_the_same_where_hosting_begins_to_pay(
    prefill: float, ratio: float, loads: float, hours: float
) -> None:
    case = change(CASE, prefill_usd=prefill, ratio=ratio, loads=loads, hours=hours, usd_per_fetch=prefill / 1000)
    even = count_costs(change(case, loads=hosting_pays_from(case) or 0))
    assert even.host == pytest.approx(even.prefill)


@given(POSITIVE, st.floats(1.5, 1000), st.floats(10, 1e9))
def test_shipping_costs_the_same_at_its_break_even_prices(prefill: float, ratio: float, loads: float) -> None:
    case = change(CASE, prefill_usd=prefill, ratio=ratio, loads=loads, usd_per_fetch=0.02, store_usd_per_fetch=0.01)
    kept_free = change(case, store_usd_per_gb_hour=0, store_usd_per_fetch=prefill / 1000)
    with_prefill = count_costs(change(kept_free, usd_per_gb=shipping_beats_prefill_below(kept_free)))
    assert with_prefill.ship == pytest.approx(with_prefill.prefill)
    with_hosting = count_costs(change(case, usd_per_gb=shipping_beats_hosting_below(case)))
    assert with_hosting.ship == pytest.approx(with_hosting.host)


def test_the_length_from_which_reuse_is_faster_is_where_the_curves_cross() -> None:
    tokens = [100, 1000, 4000]
    prefill = [0.001 * n + 1e-7 * n * n for n in tokens]
    reuse = [0.2 + 1e-5 * n for n in tokens]
    found = break_even_tokens(tokens, prefill, reuse)
    assert found is not None
    assert 0.001 * found + 1e-7 * found**2 == pytest.approx(0.2 + 1e-5 * found)


def test_a_slow_link_moves_the_length_or_takes_it_away() -> None:
    tokens, prefill, reuse = [100, 1000], [0.1, 1.0], [0.2, 0.2]
    near = break_even_tokens(tokens, prefill, reuse)
    far = break_even_tokens(tokens, prefill, reuse, seconds_per_token=0.0005)
    assert (near, far) == pytest.approx((200, 400))
    assert break_even_tokens(tokens, prefill, reuse, seconds_per_token=0.002) is None


def test_one_length_says_nothing_of_the_others() -> None:
    assert break_even_tokens([100], [1.0], [0.1]) is None


def test_units() -> None:
    assert egress_usd(1_000_000_000, 0.09) == 0.09
    assert gpu_usd(3600, 2.5) == 2.5
    assert tokens_usd(2_000_000, 3) == 6
    assert break_even_gbps(3e9, 2) == 1.5
    assert transfer_seconds(1e9, 10) == 0.8
    assert break_even_usd_per_gb(0.01, 5e8) == 0.02
