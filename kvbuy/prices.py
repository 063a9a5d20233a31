"""What things cost: the dated price table that kvbuy ships, and how a file overrides it.

Every price says when it was read and where; some could be read at second hand only (`secondary`). It knows prices, not
what anybody does with them (`kvbuy.economics`). A gigabyte is 1e9 bytes, as providers bill it; money is US dollars.
"""

from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from kvbuy.economics import MILLION
from kvbuy.errors import StoreError, UsageError

Usd = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class Price(BaseModel):
    """Something that has a price. `date` is YYYY-MM or YYYY-MM-DD, None where nobody says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d(-\d\d)?$")] | None
    source: Annotated[str, Field(min_length=1)]
    secondary: bool = False

    @property
    def basis(self) -> str:
        """Where the price is from, in words."""
        seen = f"{self.date or 'undated'}, {self.source}" + (" (second hand)" if self.secondary else "")
        return f"listed: {self.name}, {seen}"


class GpuPrice(Price):
    """An hour of a GPU, and how many gigabytes of memory it has."""

    usd_per_hour: Usd
    memory_gb: Annotated[float, Field(ge=0.001, le=1e6)]

    @property
    def usd_per_gb_hour(self) -> float:
        """What keeping a gigabyte in its memory costs: its share of the whole GPU."""
        return self.usd_per_hour / self.memory_gb


class EgressPrice(Price):
    """Sending a gigabyte to the internet, first paid tier, from the store called `storage` (None: its namesake)."""

    usd_per_gb: Usd
    storage: str | None = None


class StoragePrice(Price):
    """Keeping a gigabyte in an object store, and a million requests that read."""

    usd_per_gb_month: Usd
    usd_per_million_reads: Usd = 0.0

    @property
    def usd_per_gb_hour(self) -> float:
        """A twelfth of a year is a month."""
        return self.usd_per_gb_month / HOURS_PER_MONTH


class Tariff(Price):
    """What an API takes for a million tokens: `input` to prefill, `write` and `read` of its cache, `hour` to keep."""

    input: Usd
    write: Usd
    read: Usd
    hour: Usd | None


class PriceTable(BaseModel):
    """The whole table. A kind that a file leaves out is kvbuy's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    gpus: tuple[GpuPrice, ...] = ()
    egress: tuple[EgressPrice, ...] = ()
    storage: tuple[StoragePrice, ...] = ()
    tariffs: tuple[Tariff, ...] = ()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "PriceTable":
        for kind in (self.gpus, self.egress, self.storage, self.tariffs):
            names = [price.name.casefold() for price in kind]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{twice[0]} has two prices")
        return self


HOURS_PER_MONTH = 8766 / 12
EXAMPLE = (
    'its shape is: {"version": 1, "gpus": [{"name": "ours", "usd_per_hour": 1.2, "memory_gb": 80, '
    '"date": "2026-11", "source": "our contract"}]}'
)


class Named(Protocol):
    """What can be chosen by its name."""

    @property
    def name(self) -> str:
        """Its name, whatever the case."""
        ...


P = TypeVar("P", bound=Price)
N = TypeVar("N", bound=Named)


@cache
def shipped_prices() -> PriceTable:
    """The table that came with this version of kvbuy."""
    return PriceTable.model_validate_json(files("kvbuy").joinpath("prices.json").read_bytes())


def read_prices(file: Path | None) -> PriceTable:
    """The shipped table, with the prices of a file (of the same shape) before it: an equal name replaces.

    The first price of a kind is the one that counts where none is named.

    Raises:
        StoreError: it cannot be read.
        UsageError: it is no price table.
    """
    shipped = shipped_prices()
    if file is None:
        return shipped
    try:
        own = PriceTable.model_validate_json(file.read_bytes())
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise UsageError(f"{file} is no price table: {where}: {first['msg']}", hint=EXAMPLE) from error
    return PriceTable(
        gpus=_over(own.gpus, shipped.gpus),
        egress=_over(own.egress, shipped.egress),
        storage=_over(own.storage, shipped.storage),
        tariffs=_over(own.tariffs, shipped.tariffs),
    )


def choose_price(prices: tuple[N, ...], name: str | None) -> N:
    """The price of a name, whatever its case, or the first one where none is named.

    Raises:
        UsageError: there is none of that name.
    """
    if (found := _find(prices, name)) is not None:
        return found
    raise UsageError(f"there is no price for {name!r}", hint="there are: " + ", ".join(price.name for price in prices))


def choose_store(route: EgressPrice, stores: tuple[StoragePrice, ...]) -> StoragePrice:
    """The store that a route ships from: the one it names or its namesake, the first where the table has neither."""
    return _find(stores, route.storage or route.name) or stores[0]


def choose_tariff(tariffs: tuple[Tariff, ...], name: str | None) -> Tariff:
    """The tariff of a name, from the table or else from the package genai-prices, where that is installed.

    Raises:
        UsageError: neither knows it.
    """
    if (found := _find(tariffs, name)) is not None:
        return found
    known = "the table has: " + ", ".join(tariff.name for tariff in tariffs)
    if find_spec("genai_prices") is None:
        raise UsageError(f"there is no tariff for {name!r}", hint=f"{known}; pip install 'kvbuy[prices]' knows more")
    return _look_up(str(name), known)


def _look_up(name: str, known: str) -> Tariff:
    """What the installed genai-prices says of a model, in dollars a million tokens; its table bears no date."""
    from genai_prices import Usage, calc_price

    few = 1000  # tokens: below every tier of large prompts
    try:
        price = calc_price(Usage(input_tokens=few), model_ref=name)
        read = calc_price(Usage(input_tokens=few, cache_read_tokens=few), model_ref=name)
        write = calc_price(Usage(input_tokens=few, cache_write_tokens=few), model_ref=name)
    except LookupError:
        raise UsageError(f"neither the table nor genai-prices knows {name!r}", hint=known) from None
    input_usd, read_usd, write_usd = (float(one.input_price) * MILLION / few for one in (price, read, write))
    if input_usd == 0:
        raise UsageError(f"genai-prices has no price for {name!r}", hint=known)
    return Tariff(
        name=price.model.name or price.model.id,
        input=input_usd,
        write=write_usd,
        read=read_usd,
        hour=None,
        date=None,
        source=f"genai-prices {version('genai-prices')}, {price.provider.name}",
        secondary=True,
    )


def _find(prices: tuple[N, ...], name: str | None) -> N | None:
    if name is None:
        return prices[0]
    return next((price for price in prices if price.name.casefold() == name.casefold()), None)


def _over(own: tuple[P, ...], shipped: tuple[P, ...]) -> tuple[P, ...]:
    """A file's prices, then the shipped ones that it does not replace."""
    named = {price.name.casefold() for price in own}
    return own + tuple(price for price in shipped if price.name.casefold() not in named)
