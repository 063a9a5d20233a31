"""How costs look: as JSON, as tables, and as one sentence that says what to do and what would change it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, assert_never

from kvbuy.economics import (
    Case,
    Costs,
    count_costs,
    hosting_pays_from,
    shipping_beats_hosting_below,
    shipping_beats_prefill_below,
    tokens_usd,
)
from kvbuy.paper import GPU_PRICE
from kvbuy.render import Json, dollars, duration, megabytes, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from kvbuy.cost import Estimate
    from kvbuy.paper import PaperFigure

WAYS = {
    "prefill": "prefill every time",
    "ship": "ship every time, reuse",
    "ship_once": "ship once, reuse there",
    "host": "host at the provider, reuse",
    "uncached": "users pay, uncached",
    "tariff": "users pay, cached",
    "margin": "tariff less hosting",
    "publisher": "... to the publisher",
    "provider": "... to the provider",
}
LOWEST_PRICE = 1e-4  # of a GB: nobody charges less and more than nothing
USERS_PAY = "uncached"  # the first way that is a price, not a cost


def cost_json(found: "Estimate") -> Json:
    """`cost --json`."""
    case = found.cases[0]
    return {
        "one": {
            "prefill_usd": case.prefill_usd,
            "reuse_usd": case.reuse_usd,
            "egress_usd": case.egress_usd,
            "input_usd": tokens_usd(case.tokens, case.input_usd),
            "read_usd": tokens_usd(case.tokens, case.read_usd),
        },
        "totals": [
            {
                "loads": case.loads,
                "cheapest": costs.cheapest,
                "usd": asdict(costs),
                "usd_per_load": {name: usd / case.loads for name, usd in asdict(costs).items()},
            }
            for case, costs in zip(found.cases, found.costs, strict=True)
        ],
        "tiers": [asdict(tier) for tier in found.tiers],
        "verdict": verdict(found.cases[-1]),
        "caveats": list(found.caveats),
        "inputs": {name: asdict(figure) for name, figure in found.inputs.items()},
        "computed": {name: asdict(figure) for name, figure in found.computed.items()},
        "formulas": "kvbuy/economics.py",
    }


def print_cost(found: "Estimate") -> None:
    """Tables and words on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(load_table(found))
    console.print(total_table(found))
    console.print(total_table(found, each=True))
    console.print(tier_table(found))
    for line in (*cost_notes(found), "", verdict(found.cases[-1])):
        console.print(line)
    for caveat in found.caveats:
        console.print(caveat)
    console.print("")
    for line in basis_lines(found):
        console.print(line)


def load_table(found: "Estimate") -> "Table":
    """What one load takes, in time and money."""
    case, subject = found.cases[0], found.subject
    prefill, reuse = subject.prefill_seconds.value, subject.reuse_seconds.value
    transfer = found.computed["transfer_seconds"].value
    table = plain_table("one load", "time", "cost")
    table.add_row("prefill", duration(prefill), dollars(case.prefill_usd))
    table.add_row("reuse where the KV is", duration(reuse), dollars(case.reuse_usd))
    table.add_row("ship and reuse", duration(transfer + reuse), dollars(case.egress_usd + case.reuse_usd))
    table.add_row("users pay, uncached", "", dollars(tokens_usd(case.tokens, case.input_usd)))
    table.add_row("users pay, cached", "", dollars(tokens_usd(case.tokens, case.read_usd)))
    return table


def total_table(found: "Estimate", *, each: bool = False) -> "Table":
    """What all loads cost in each way, or each of so many."""
    table = plain_table("each of so many" if each else "all loads", *(count(case.loads) for case in found.cases))
    shares = [case.loads if each else 1 for case in found.cases]
    for name, label in WAYS.items():
        if name == USERS_PAY:
            table.add_section()
        sums = (getattr(costs, name) / share for costs, share in zip(found.costs, shares, strict=True))
        table.add_row(label, *map(dollars, sums))
    if not each:
        table.add_section()
        table.add_row("cheapest at many places", *(costs.cheapest for costs in found.costs))
    return table


def tier_table(found: "Estimate") -> "Table":
    """What an hour of residency costs, tier by tier."""
    table = plain_table("keeping it", "an hour", "basis")
    for tier in found.tiers:
        table.add_row(tier.name, dollars(tier.usd_per_hour), tier.basis.removeprefix(f"listed: {tier.name}, "))
    return table


def cost_notes(found: "Estimate") -> list[str]:
    """What is priced, and its break-evens."""
    case, computed = found.cases[0], found.computed
    loads, gbps, tokens = (computed[f"break_even_{name}"].value for name in ("loads", "gbps", "tokens"))
    size = found.inputs["kv_bytes"]
    notes = [f"{case.tokens} tokens, {megabytes(round(size.value))}; prefill : reuse is {case.ratio:.1f}."]
    if math.isinf(loads):
        notes.append("Break-even: never, reuse is not faster than prefill here.")
    else:
        notes.append(f"Break-even: computing it once pays from {loads:.2f} loads on.")
    notes.append(f"Below {gbps:.3g} GB/s ({gbps * 8:.3g} Gbit/s) of link, fetching takes longer than prefill.")
    if math.isinf(tokens):
        notes.append("Fetched over the link, reuse is slower than prefill at every length.")
    elif not math.isnan(tokens):
        least = found.subject.bench.rows[0].tokens if found.subject.bench else 0
        where = f"from {math.ceil(tokens)} tokens on" if tokens > least else "at every length that was measured"
        notes.append(f"Fetched over the link, reuse is faster than prefill {where}.")
    return notes


def basis_lines(found: "Estimate") -> list[str]:
    """Every figure that goes in or follows for any number of loads, and what it is based on."""
    figures = (found.inputs | found.computed).items()
    return [f"{name} {figure.value:.6g}, {figure.basis}" for name, figure in figures if not math.isnan(figure.value)]


def verdict(case: Case) -> str:
    """Prefill, ship or host, and what would change it. `kvbuy/report/page.js` says the same in the same words."""
    costs = count_costs(case)
    loads, changes = _loads(case.loads, " costs", " cost"), _change(case, costs)
    once = f" All at one place: {dollars(costs.ship_once)}, shipped once."
    best = min(costs.prefill, costs.host, costs.ship)
    said = f"{costs.cheapest.capitalize()}: {loads} {_compare(costs)}. {changes}"
    return said + (once if costs.ship_once < best and dollars(costs.ship_once) != dollars(best) else "")


def _change(case: Case, costs: Costs) -> str:
    """What would change the verdict."""
    pays = hosting_pays_from(case)
    below_prefill, below_hosting = shipping_beats_prefill_below(case), shipping_beats_hosting_below(case)
    match costs.cheapest:
        case "host":
            shipping = "only where egress is free does shipping cost as little"
            if dollars(costs.ship) == dollars(costs.host):
                shipping = "shipping from that store costs the same"
            elif below_hosting >= LOWEST_PRICE:
                shipping = f"below {dollars(below_hosting)} a GB shipping is"
            return f"Below {_loads(math.ceil(pays or 0))} prefill is cheaper; {shipping}."
        case "ship":
            return f"Above {dollars(min(below_prefill, below_hosting))} a GB it is not."
        case "prefill":
            if case.ratio <= 1:
                return "Reuse is not faster here, so no price changes that."
            if pays is None:
                return "Prefill costs no more than a load here, so nothing is cheaper."
            hosting = f"From {_loads(math.floor(pays) + 1)} on hosting is cheaper"
            return hosting + (f"; below {dollars(below_prefill)} a GB shipping is." if below_prefill > 0 else ".")
        case _:
            assert_never(costs.cheapest)


def paper_json(figures: "Sequence[PaperFigure]") -> Json:
    """`cost --paper --json`."""
    facts = [asdict(figure) for figure in figures]
    return {"paper": "arXiv 2606.13361", "figures": facts, "gpu_cost_basis": GPU_PRICE.basis}


def print_paper(figures: "Sequence[PaperFigure]") -> None:
    """The paper's figures, printed and computed, on its basis and on a GPU's cost."""
    from rich.console import Console

    table = plain_table("arXiv 2606.13361", "prints", "its inputs", "at GPU cost", "basis")
    for one in figures:
        beside = "" if one.at_gpu_cost is None else quantity(one.at_gpu_cost, one.unit)
        table.add_row(one.name, one.printed, quantity(one.value, one.unit), beside, one.basis.partition(": ")[0])
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    for basis in dict.fromkeys([*(one.basis for one in figures), f"GPU cost: {GPU_PRICE.basis}"]):
        console.print(basis)


def quantity(value: float, unit: str) -> str:
    """A figure with its unit: usd, million usd, x (a ratio) or none."""
    match unit:
        case "usd":
            return dollars(value)
        case "million usd":
            return f"${value / 1e6:,.2f} M" if value >= 1e4 else dollars(value)
        case _:
            return f"{value:,.{1 if unit else 2}f}{unit}"


def count(number: float) -> str:
    """A number of loads, every digit of it."""
    if number < 1e6 or number % 10_000:
        return f"{number:,.0f}"
    return f"{number / 1e6:,.2f}".rstrip("0").rstrip(".") + " M"


def _loads(number: float, one: str = "", many: str = "") -> str:
    return f"{count(number)} load{one}" if number == 1 else f"{count(number)} loads{many}"


def _compare(costs: Costs) -> str:
    ways = {"prefill": "prefilled", "host": "hosted", "ship": "shipped"}
    order = [costs.cheapest, *(way for way in ways if way != costs.cheapest)]
    parts = [f"{dollars(getattr(costs, way))} {ways[way]}" for way in order]
    return f"{parts[0]}, {parts[1]}, {parts[2]}"
