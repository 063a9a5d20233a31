"""One HTML page of what was measured and what it is worth: no network, opens from disk, prints.

Sections are made of what is there: a bench run, a measurement, a cost estimate. The sliders run `page.js`, which
repeats the formulas of `kvbuy.economics`; everything else is text and SVG and needs no script.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from math import log10
from string import Template

from kvbuy.cost import Estimate
from kvbuy.figures import Benchmark, CodecRatio, Row, Weights
from kvbuy.render import dollars, duration, megabytes
from kvbuy.render_cost import WAYS, basis_lines, cost_notes, count, verdict
from kvbuy.report.plots import plot_first_token, plot_layers, plot_lengths

COMPARED = ("prefill", "ship", "ship_once", "host")


def make_report(bench: Benchmark | None, weights: Weights | None, estimate: Estimate | None) -> str:
    """The page, as HTML text."""
    sections = [
        *(_bench_sections(bench) if bench else ()),
        *(_weight_sections(weights) if weights else ()),
        *(_cost_sections(estimate) if estimate else ()),
    ]
    return _template("page.html").substitute(
        title="kvbuy: what a document's KV is worth",
        heading=escape(_heading(bench, weights)),
        subject=escape(_subject(bench, weights)),
        css=_text("page.css"),
        js=_text("page.js"),
        sections="\n".join(sections),
        footer=escape(_footer(bench)),
        data=_script_data(estimate),
    )


def _heading(bench: Benchmark | None, weights: Weights | None) -> str:
    if bench is None:
        return "What a document's KV weighs" if weights else "What a document's KV costs"
    longest = bench.rows[-1]
    if longest.ratio <= 1:
        return f"Reuse is not faster than prefill at {longest.tokens} tokens"
    times = f"{longest.ratio:.0f}" if longest.ratio >= 10 else f"{longest.ratio:.1f}"
    return f"Reuse is {times} times faster than prefill at {longest.tokens} tokens"


def _subject(bench: Benchmark | None, weights: Weights | None) -> str:
    if bench is not None:
        exact = "every length bit-exact" if all(row.exact for row in bench.rows) else "not bit-exact at every length"
        return f"{bench.model}, {bench.dtype}, on {bench.machine}, {bench.made[:10]}; {exact}"
    return _weighed(weights) if weights else ""


def _weighed(weights: Weights) -> str:
    return f"{weights.document}, {weights.model}, {weights.dtype}, {weights.made[:10]}; {weights.tokens} tokens"


def _footer(bench: Benchmark | None) -> str:
    if bench is None:
        return "Made by kvbuy report."
    return f"Made by kvbuy report from a run of {bench.producer}, {bench.software}; document: {bench.document}."


def _bench_sections(bench: Benchmark) -> Iterator[str]:
    first, last = bench.rows[0], bench.rows[-1]
    grows = f"{first.ratio:.1f} times at {first.tokens} tokens, {last.ratio:.1f} times at {last.tokens}"
    yield _section(
        "Prefill and reuse",
        f"<p>Reuse is load and first token, prompt of {bench.prompt_tokens} tokens, digests checked: {grows}.</p>",
        _figure(plot_lengths(bench.rows), "Seconds of prefill and of reuse, by document length"),
        _length_table(bench.rows),
        f'<p class="note">Medians of {bench.repeats} (prefill of at most 3), codec {escape(bench.codec)}.</p>',
    )
    yield _section(
        "The first token, and the step after it",
        _figure(plot_first_token(bench.rows), "Load and prompt rows, then a decode step, by document length"),
        f'<p class="note">A load reaches {bench.limits.load_gbps:.3g} GB/s, {bench.limits.load_share:.2f} of '
        f"{_limit(bench)}.</p>",
        _baselines(bench),
    )


def _limit(bench: Benchmark) -> str:
    if bench.limits.host_to_device_gbps is None:
        return "what this machine reads"
    return "the slower of reading the file and copying to the device"


def _length_table(rows: Sequence[Row]) -> str:
    cells = [
        (
            str(row.tokens),
            duration(row.prefill_seconds),
            duration(row.single_pass_seconds),
            duration(row.reuse_seconds),
            f"{row.ratio:.1f}",
            f"{row.prefill_flops.total / row.reuse_flops.total:.0f}",
            "yes" if row.exact else "no",
        )
        for row in rows
    ]
    return _table(("tokens", "prefill", "one pass", "reuse", "ratio", "FLOP ratio", "exact"), cells)


def _baselines(bench: Benchmark) -> str:
    if not bench.baselines:
        return ""
    longest = bench.rows[-1]
    ours = ("kvbuy, verified", megabytes(longest.file_bytes), duration(longest.reuse_seconds), f"{longest.ratio:.1f}")
    rows = [
        (
            one.name,
            "-" if one.bytes is None else megabytes(one.bytes),
            duration(one.reuse_seconds),
            f"{one.prefill_seconds / one.reuse_seconds:.1f}",
        )
        for one in bench.baselines
    ]
    return _table((f"at {longest.tokens} tokens", "file", "load + first token", "ratio to its prefill"), [ours, *rows])


def _weight_sections(weights: Weights) -> Iterator[str]:
    smallest = min(weights.codecs, key=lambda codec: codec.ratio)
    yield _section(
        "How small it gets, without losing a bit",
        f"<p>{escape(_weighed(weights))}, {megabytes(weights.kv_bytes)} of KV; {escape(smallest.name)} leaves "
        f"{smallest.ratio:.3f} of it.</p>",
        _table(("codec", "size", "ratio", "encode GB/s", "decode GB/s"), list(map(_codec_row, weights.codecs))),
        _figure(plot_layers(smallest.layers), f"What {smallest.name} leaves of each layer") if smallest.layers else "",
    )


def _codec_row(codec: CodecRatio) -> tuple[str, ...]:
    speeds = (f"{codec.encode_gbps:.2g}", f"{codec.decode_gbps:.2g}")
    about = "~" if codec.sampled else ""
    return (codec.name, about + megabytes(codec.bytes), f"{about}{codec.ratio:.3f}", *speeds)


def _cost_sections(found: Estimate) -> Iterator[str]:
    case, costs = found.cases[-1], found.costs[-1]
    most = max(getattr(costs, way) for way in COMPARED) or 1.0
    rows = "\n".join(
        f'<tr data-way="{way}"><td>{escape(WAYS[way])}</td><td class="usd">{dollars(getattr(costs, way))}</td>'
        f'<td class="bar"><span style="width:{100 * getattr(costs, way) / most:.4g}%"></span></td></tr>'
        for way in COMPARED
    )
    sums = "\n".join(
        f'<tr><td>{escape(label)}</td><td data-sum="{name}">{dollars(getattr(costs, name))}</td></tr>'
        for name, label in WAYS.items()
        if name not in COMPARED
    )
    basis = "".join(f"<li>{escape(line)}</li>" for line in basis_lines(found))
    tiers = [(tier.name, dollars(tier.usd_per_hour), tier.basis) for tier in found.tiers]
    yield _section(
        "What it costs: prefill, ship or host",
        f"<p>As measured: {escape(' '.join(cost_notes(found)))}</p>",
        f'<p class="verdict" id="verdict" aria-live="polite">{escape(verdict(case))}</p>',
        *(f'<p class="note">{escape(caveat)}</p>' for caveat in found.caveats),
        _controls(found),
        _captioned("What all loads cost, in US dollars", rows),
        _captioned("What users pay, and what that leaves over hosting", sums),
        "<details><summary>What keeping it costs, by place</summary>",
        _table(("place", "an hour", "basis"), tiers) + "</details>",
        f"<details><summary>Where the figures are from</summary><ul>{basis}</ul></details>",
    )


def _controls(found: Estimate) -> str:
    """The sliders: of loads and ratio in powers of ten, wide enough for what they start from."""
    case, hourly = found.cases[-1], found.inputs["gpu_usd_per_hour"].value
    loads, ratio = log10(case.loads), log10(case.ratio)
    return _template("controls.html").substitute(
        loads=loads,
        most_loads=max(9.0, loads),
        shown_loads=count(case.loads),
        usd_per_gb=case.usd_per_gb,
        most_usd_per_gb=max(0.2, 2 * case.usd_per_gb),
        usd_per_hour=hourly,
        most_usd_per_hour=max(15.0, 2 * hourly),
        ratio=ratio,
        least_ratio=min(0.0, ratio),
        most_ratio=max(3.0, ratio),
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def _figure(svg: str, caption: str) -> str:
    labelled = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
    return f"<figure>{labelled}<figcaption class='note'>{escape(caption)}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{titles}</tr>\n{body}</table></div>'


def _captioned(caption: str, rows: str) -> str:
    return f'<div class="wide"><table><caption>{escape(caption)}</caption>{rows}</table></div>'


def _script_data(found: Estimate | None) -> str:
    """The case that the sliders start from, as JSON that cannot end its script element."""
    if found is None:
        return "null"
    facts = asdict(found.cases[-1]) | {"prefill_seconds": found.subject.prefill_seconds.value}
    return json.dumps(facts, allow_nan=False).replace("</", "<\\/")


def _template(name: str) -> Template:
    return Template(_text(name))


def _text(name: str) -> str:
    return files("kvbuy.report").joinpath(name).read_text(encoding="utf-8")
