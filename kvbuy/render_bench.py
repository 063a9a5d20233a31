"""How a bench run looks: as JSON, and as tables and the main curve on a terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvbuy.figures import Benchmark, Row
from kvbuy.render import bar, duration, megabytes, plain_table

if TYPE_CHECKING:
    from rich.table import Table

WIDEST_CURVE = 50
BESIDE_CURVE = 22  # columns of the curve's table that are no bars


def print_benchmark(found: Benchmark) -> None:
    """Tables and the main curve on stdout."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{found.model}, {found.dtype}, {found.machine}; {found.software}")
    console.print(row_table(found))
    console.print(work_table(found))
    width = min(WIDEST_CURVE, console.width - BESIDE_CURVE)
    console.print(curve_table(found, width=width, ascii_only=console.options.ascii_only))
    for line in notes(found):
        console.print(line)
    if found.baselines:
        console.print(baseline_table(found))
    for one in found.baselines:
        console.print(f"{one.name}: {one.note}")
    for missing in found.missing:
        console.print(f"{missing.name}: not measured; {missing.hint}")


def row_table(found: Benchmark) -> "Table":
    """Seconds by length."""
    columns = ("tokens", "prefill", "single", "load", "cold", "first", "resident", "step", "exact")
    table = plain_table(*columns)
    for row in found.rows:
        times = (row.prefill_seconds, row.single_pass_seconds, row.load_seconds, row.cold_load_seconds)
        after = (row.first_token_seconds, row.resident_seconds, row.decode_seconds)
        table.add_row(str(row.tokens), *map(_seconds, (*times, *after)), _exact(row))
    return table


def work_table(found: Benchmark) -> "Table":
    """Operations, floors and memory by length."""
    table = plain_table("tokens", "KV", "GFLOP prefill", "reuse", "ratio", "floors", "peaks, MB")
    for row in found.rows:
        flops = (row.prefill_flops.total, row.reuse_flops.total)
        floors = (flops[0] / found.limits.matmul_tflops / 1e12, row.floor_seconds)
        peaks = [f"{peak / 1e6:.0f}" for peak in (row.prefill_peak_bytes, row.reuse_peak_bytes) if peak is not None]
        work = (*(_number(count / 1e9) for count in flops), _number(flops[0] / flops[1]))
        cells = (", ".join(map(_seconds, floors)), ", ".join(peaks) or "-")
        table.add_row(str(row.tokens), megabytes(row.kv_bytes), *work, *cells)
    return table


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _exact(row: Row) -> str:
    return "yes" if row.exact else f"no: {row.blocks_equal}/{row.blocks} blocks, {row.tokens_equal} tokens"


def curve_table(found: Benchmark, *, width: int, ascii_only: bool) -> "Table":
    """The main curve: how many times cheaper reuse is, by length, as bars."""
    most = max(row.ratio for row in found.rows)
    table = plain_table("tokens", "prefill : reuse", "")
    for row in found.rows:
        table.add_row(str(row.tokens), bar(row.ratio / most, width=width, ascii_only=ascii_only), f"{row.ratio:.1f}")
    return table


def notes(found: Benchmark) -> Iterator[str]:
    """What the tables leave to be said."""
    limits = found.limits
    yield (
        f"Seconds, medians of {found.repeats} (prefill: at most 3; cold: one): prefill in blocks and in a single pass, "
        f"load, first token of a {found.prompt_tokens}-token prompt, the same on a resident cache, a decode step. "
        "The load is into buffers that were made ready before, as while weights load. "
        f"Reuse is load and first token; the ratio is the faster prefill over it. Codec {found.codec}, every digest "
        "computed and checked."
    )
    if any(row.cold_load_seconds is None for row in found.rows):
        yield "Where cold is -, the file could not be dropped from the page cache."
    across = "" if limits.host_to_device_gbps is None else f", to the device {limits.host_to_device_gbps:.3g}"
    yield (
        f"Limits: memory copy {limits.memcpy_gbps:.3g} GB/s, file read {limits.read_gbps:.3g}{across}; loading the "
        f"longest reaches {limits.load_gbps:.3g} of KV, {limits.load_share:.2f} of the lower. Matrix products "
        f"{limits.matmul_tflops:.3g} TFLOP/s. Floors: of prefill its operations at that rate; of reuse its bytes "
        "copied, and the first token on a resident cache. Peaks: of prefill and of reuse, weights among them."
    )
    if found.repeats > 1:
        yield f"Widest spread: {_widest(found.rows)}."


def baseline_table(found: Benchmark) -> "Table":
    """Other ways to reuse, at the longest length."""
    longest = found.rows[-1]
    table = plain_table(f"at {longest.tokens} tokens", "file", "prefill", "load", "reuse", "ratio")
    for one in found.baselines:
        size = "-" if one.bytes is None else megabytes(one.bytes)
        load = "-" if one.load_seconds is None else duration(one.load_seconds)
        times = (duration(one.prefill_seconds), load, duration(one.reuse_seconds))
        table.add_row(one.name, size, *times, f"{one.prefill_seconds / one.reuse_seconds:.1f}")
    ours = (duration(longest.scratch_seconds), duration(longest.load_seconds), duration(longest.reuse_seconds))
    table.add_row("kvbuy (verified)", megabytes(longest.file_bytes), *ours, f"{longest.ratio:.1f}")
    return table


def _widest(rows: tuple[Row, ...]) -> str:
    """The time that varied most between its repeats."""
    spreads = [(high / low, row.tokens, name) for row in rows for name, (low, high) in row.spread.items() if low > 0]
    factor, tokens, name = max(spreads)
    return f"{name.removesuffix('_seconds').replace('_', ' ')} at {tokens} tokens, a factor of {factor:.2f}"
