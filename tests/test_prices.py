"""The price table: dated, sourced, and overridden by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvbuy.errors import StoreError, UsageError
from kvbuy.prices import EXAMPLE, choose_price, choose_tariff, read_prices, shipped_prices

OWN = {"name": "aws", "usd_per_gb": 0.05, "date": "2026-12", "source": "our contract"}


def write(folder: Path, table: dict[str, Any]) -> Path:
    path = folder / "prices.json"
    path.write_text(json.dumps(table))
    return path


def test_every_price_is_dated_and_has_a_source() -> None:
    table = shipped_prices()
    prices = (*table.gpus, *table.egress, *table.storage, *table.tariffs)
    assert len(prices) > 15
    assert all(price.date and price.date in price.basis and price.source in price.basis for price in prices)
    assert [price.name for price in table.egress if not price.secondary] == ["Cloudflare R2", "Hugging Face"]
    stores = {price.name for price in table.storage}
    assert all((route.storage or route.name) in stores for route in table.egress)


def test_the_basis_says_what_was_read_at_second_hand() -> None:
    aws = choose_price(shipped_prices().egress, "aws")
    assert aws.basis.startswith("listed: AWS, 2026-05, ")
    assert aws.basis.endswith("(second hand)")


def test_cached_tokens_never_cost_more_than_uncached() -> None:
    assert all(tariff.read < tariff.input <= tariff.write for tariff in shipped_prices().tariffs)


def test_a_file_s_price_replaces_the_one_of_its_name_and_goes_first(tmp_path: Path) -> None:
    table = read_prices(write(tmp_path, {"version": 1, "egress": [OWN]}))
    assert table.egress[0].usd_per_gb == 0.05
    assert [price.name for price in table.egress].count("AWS") == 0
    assert table.gpus == shipped_prices().gpus


def test_a_price_is_found_whatever_its_case() -> None:
    assert choose_price(shipped_prices().gpus, "h100") is shipped_prices().gpus[0]


def test_an_unknown_name_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no price for 'TPU'") as error:
        choose_price(shipped_prices().gpus, "TPU")
    assert "H100, H100 long tail" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"version": 2}, "version"),
        ({"version": 1, "egress": [OWN | {"usd_per_gb": -1}]}, "egress.0.usd_per_gb"),
        ({"version": 1, "egress": [OWN | {"usd_per_gb": float("nan")}]}, "egress.0.usd_per_gb"),
        ({"version": 1, "egress": [OWN | {"date": "last week"}]}, "egress.0.date"),
        ({"version": 1, "egress": [OWN, OWN]}, "aws has two prices"),
        ({"version": 1, "egress": [OWN | {"name": " "}]}, "egress.0.name"),
        ({"version": 1, "water": []}, "water"),
    ],
)
def test_what_is_no_price_table_is_refused_with_the_reason(tmp_path: Path, table: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_prices(write(tmp_path, table))


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    for text in ("aws 0.09", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UsageError, match="no price table") as error:
            read_prices(path)
        assert '"usd_per_hour": 1.2' in (error.value.hint or "")


def test_the_example_that_an_error_shows_is_a_price_table(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(EXAMPLE.removeprefix("its shape is: "))
    assert read_prices(path).gpus[0].name == "ours"


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        read_prices(tmp_path / "none.json")


def test_a_tariff_that_the_table_lacks_is_looked_up() -> None:
    found = choose_tariff(shipped_prices().tariffs, "gpt-4o")
    assert 0 < found.read < found.input
    assert found.basis.startswith("listed: ")
    assert "genai-prices" in found.source
    assert "undated" in found.basis


def test_a_tariff_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="neither the table nor genai-prices"):
        choose_tariff(shipped_prices().tariffs, "no-such-model")
    monkeypatch.setattr("kvbuy.prices.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="no tariff for 'gpt-4o'") as error:
        choose_tariff(shipped_prices().tariffs, "gpt-4o")
    assert "pip install 'kvbuy[prices]'" in (error.value.hint or "")
