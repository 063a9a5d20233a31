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
    case, subject = found.cases[0], found.subject
    return {
        "tokens": case.tokens,
        "kv_bytes": case.kv_bytes,
        "seconds": {
            "prefill": subject.prefill_seconds.value,
            "reuse": subject.reuse_seconds.value,
            "transfer": found.transfer_seconds,
        },
        "ratio": case.ratio,
        "per_load": {
            "prefill_usd": case.prefill_usd,
            "reuse_usd": case.reuse_usd,
            "egress_usd": case.egress_usd,
            "uncached_usd": case.tokens / 1e6 * case.input_usd,
            "tariff_usd": case.tokens / 1e6 * case.read_usd,
        },
        "totals": [
            {"loads": case.loads, "plan": costs.plan} | {f"{name}_usd": usd for name, usd in asdict(costs).items()}
            for case, costs in zip(found.cases, found.costs, strict=True)
        ],
        "residency": [asdict(tier) for tier in found.tiers],
        "residency_usd": case.residency_usd,
        "break_even_loads": found.break_even_loads,
        "break_even_gbps": found.break_even_gbps,
        "break_even_tokens": found.break_even_tokens,
        "verdict": verdict(found.cases[-1]),
        "basis": found.basis,
    }


def print_cost(found: "Estimate") -> None:
    """Tables and words on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(load_table(found))
    console.print(total_table(found))
    console.print(tier_table(found))
    for line in cost_notes(found):
        console.print(line)


def load_table(found: "Estimate") -> "Table":
    """What one load takes, in time and money."""
    case, subject = found.cases[0], found.subject
    prefill, reuse, transfer = subject.prefill_seconds.value, subject.reuse_seconds.value, found.transfer_seconds
    table = plain_table("one load", "time", "cost")
    table.add_row("prefill", duration(prefill), dollars(case.prefill_usd))
    table.add_row("reuse where the KV is", duration(reuse), dollars(case.reuse_usd))
    table.add_row("ship and reuse", duration(transfer + reuse), dollars(case.egress_usd + case.reuse_usd))
    table.add_row("users pay, uncached", "", dollars(case.tokens / 1e6 * case.input_usd))
    table.add_row("users pay, cached", "", dollars(case.tokens / 1e6 * case.read_usd))
    return table


def total_table(found: "Estimate") -> "Table":
    """What all loads cost in each way."""
    table = plain_table("all loads", *(count(case.loads) for case in found.cases))
    for name, label in WAYS.items():
        if name == USERS_PAY:
            table.add_section()
        table.add_row(label, *(dollars(getattr(costs, name)) for costs in found.costs))
    table.add_section()
    table.add_row("cheapest", *(costs.plan for costs in found.costs))
    return table


def tier_table(found: "Estimate") -> "Table":
    """What an hour of residency costs, tier by tier."""
    table = plain_table("keeping it", "an hour", "basis")
    for tier in found.tiers:
        table.add_row(tier.name, dollars(tier.usd_per_hour), tier.basis.partition(": ")[0])
    return table


def cost_notes(found: "Estimate") -> list[str]:
    """Break-evens, the verdict, and what every figure is based on."""
    case, loads, gbps = found.cases[0], found.break_even_loads, found.break_even_gbps
    lines = [f"{case.tokens} tokens, {megabytes(round(case.kv_bytes))}; prefill : reuse is {case.ratio:.1f}."]
    if loads is None:
        lines.append("Break-even: never, reuse is not faster than prefill here.")
    else:
        lines.append(f"Break-even: computing it once pays from {loads:.2f} loads on.")
    lines.append(f"Below {gbps:.3g} GB/s ({gbps * 8:.3g} Gbit/s) of link, fetching takes longer than prefill.")
    if found.break_even_tokens is not None:
        tokens = max(1, math.ceil(found.break_even_tokens))
        lines.append(f"Fetched over the link, reuse is faster than prefill from {tokens} tokens on.")
    lines += ["", verdict(found.cases[-1]), "", "Basis of the figures:"]
    return lines + [f"  {name}: {basis}" for name, basis in found.basis.items()]


def verdict(case: Case) -> str:
    """Prefill, ship or host, and what would change it. `kvbuy/report/page.js` says the same in the same words."""
    costs = count_costs(case)
    return (
        f"{costs.plan.capitalize()}: {_loads(case.loads, ' costs', ' cost')} {_compare(costs)}. {_change(case, costs)}"
    )


def _change(case: Case, costs: Costs) -> str:
    """What would change the verdict."""
    pays = hosting_pays_from(case)
    below_prefill, below_hosting = shipping_beats_prefill_below(case), shipping_beats_hosting_below(case)
    match costs.plan:
        case "host":
            shipping = f"below {dollars(below_hosting)} a GB shipping is"
            if below_hosting < LOWEST_PRICE:
                shipping = "no price of egress that anybody charges makes shipping so"
            return f"Below {_loads(math.ceil(pays or 0))} prefill is cheaper; {shipping}."
        case "ship":
            return f"Above {dollars(min(below_prefill, below_hosting))} a GB it is not."
        case "prefill":
            if pays is None:
                return "Reuse is not faster here, so no price changes that."
            hosting = f"From {_loads(math.floor(pays) + 1)} on hosting is cheaper"
            return hosting + (f"; below {dollars(below_prefill)} a GB shipping is." if below_prefill > 0 else ".")
        case _:
            assert_never(costs.plan)


def paper_json(figures: "Sequence[PaperFigure]") -> Json:
    """`cost --paper --json`."""
    return {"paper": "arXiv 2606.13361", "figures": [asdict(figure) for figure in figures]}


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
    """A number of loads."""
    return f"{number / 1e6:,g} M" if number >= 1e6 else f"{number:,.0f}"


def _loads(number: float, one: str = "", many: str = "") -> str:
    return f"{count(number)} load{one}" if number == 1 else f"{count(number)} loads{many}"


def _compare(costs: Costs) -> str:
    ways = {"prefill": "prefilled", "host": "hosted", "ship": "shipped"}
    order = [costs.plan, *(way for way in ways if way != costs.plan)]
    parts = [f"{dollars(getattr(costs, way))} {ways[way]}" for way in order]
    return f"{parts[0]}, {parts[1]}, {parts[2]}"
