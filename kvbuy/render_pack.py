"""Packs as tables and JSON. Knows no model and no file."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvbuy.render import megabytes, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from kvbuy.calibrate import Fitted
    from kvbuy.codec.pack import Listed

Json = dict[str, Any]


def fitted_json(fitted: "Fitted") -> Json:
    """`pack fit --json`; `pays_after_tokens` is null where the pack saves nothing."""
    facts = fitted.pack.facts
    return {
        "path": str(fitted.path),
        "digest": fitted.pack.digest,
        "bytes": fitted.pack.size,
        "model": facts.model,
        "fingerprint": facts.fingerprint,
        "dtype": facts.dtype,
        "tokens": facts.tokens,
        "ratio": fitted.ratio,
        "fast_ratio": fitted.fast_ratio,
        "bytes_per_token": fitted.token_bytes,
        "pays_after_tokens": fitted.pays_after,
        "seconds": fitted.seconds,
    }


def fitted_table(fitted: "Fitted") -> "Table":
    """What `pack fit` made, and what it is worth."""
    facts = fitted.pack.facts
    table = plain_table("pack", fitted.pack.digest)
    saved = f"after {fitted.pays_after} cached tokens" if fitted.pays_after is not None else "never: use fast"
    rows = {
        "file": str(fitted.path),
        "size": megabytes(fitted.pack.size),
        "model": f"{facts.model}, {facts.dtype}",
        "fitted to": f"{facts.tokens} tokens in {fitted.seconds:.0f} s",
        "ratio": f"{fitted.ratio:.3f} of the KV's size on a text it has not seen (fast: {fitted.fast_ratio:.3f})",
        "pays": f"{saved}, against fast",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def listed_json(listed: "Listed") -> Json:
    """An entry of `pack ls --json`."""
    facts = listed.facts
    kept = {"model": facts.model, "dtype": facts.dtype, "fingerprint": facts.fingerprint, "tokens": facts.tokens}
    return {"digest": listed.digest, "path": str(listed.path), "bytes": listed.path.stat().st_size} | kept


def listed_table(packs: Sequence["Listed"]) -> "Table":
    """The packs in the store."""
    table = plain_table("pack", "model", "dtype", "size", "fitted to")
    for one in packs:
        facts = listed_json(one)
        sizes = (megabytes(facts["bytes"]), f"{facts['tokens']} tokens")
        table.add_row(f"{one.digest[:12]}...", facts["model"], facts["dtype"], *sizes)
    return table
