"""Results on a terminal or as JSON: stdout is data, stderr the rest. Knows how results look, not how they are made."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any, assert_never

from kvbuy.parts import Codec, DenseCodec
from kvbuy.places import pack_path
from kvbuy.verdict import Damaged, Drift, Exact, Exactness, Inexact, Misfit, Replayed, Verdict, Wrong

if TYPE_CHECKING:
    from rich.table import Table

    from kvbuy.artifact import Artifact
    from kvbuy.errors import KvbuyError
    from kvbuy.prefill import Precomputed
    from kvbuy.recode import Converted
    from kvbuy.reuse import Generation

Json = dict[str, Any]

EIGHTHS = " ▏▎▍▌▋▊▉"


def print_json(value: Json) -> None:
    """One JSON object on stdout. What is not a finite number becomes null."""
    print(json.dumps(_finite(value)), flush=True)


def print_table(table: "Table") -> None:
    """A table on stdout."""
    from rich.console import Console

    Console(highlight=False, markup=False, emoji=False).print(table)


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def stream(text: str) -> None:
    """A piece of an answer on stdout, at once."""
    print(text, end="", flush=True)


def ask() -> str | None:
    """The next question from stdin, None at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def print_error(error: "KvbuyError", *, as_json: bool) -> None:
    """A failure: on stderr for people, as one JSON object on stdout where JSON was asked for."""
    differences = getattr(error, "differences", ())
    if as_json:
        facts = {"error": error.message, "kind": type(error).__name__, "hint": error.hint}
        print_json(facts | ({"differences": list(differences)} if differences else {}))
        return
    say(f"error: {error.message}")
    for difference in differences:
        say(f"  - {difference}")
    if error.hint:
        say(f"hint: {error.hint}")


@contextmanager
def token_progress(counted: str = "tokens") -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr: what is being done, how many are done (of layers, or of what is counted), time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.finished_speed or task.speed or 0:.0f} {task.fields['unit']}/s")

    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        Speed(),
    ]
    tasks: dict[str, Any] = {}
    with Progress(*columns, TimeLeft(), console=Console(stderr=True), transient=True) as bar:

        def update(step: str, done: int, total: int) -> None:
            if step not in tasks:
                unit = "layers" if step.endswith("layers") else counted
                tasks[step] = bar.add_task(step, total=total or None, unit=unit)
            bar.update(tasks[step], completed=done)

        yield update


def precomputed_json(made: "Precomputed") -> Json:
    """An entry of `precompute --json`."""
    artifact = made.artifact
    return {
        "artifact": str(artifact.path),
        "id": artifact.id,
        "tokens": artifact.manifest.document.tokens,
        "blocks": len(artifact.manifest.blocks),
        "bytes": artifact.header_bytes + artifact.manifest.data_bytes(),
        "kv_bytes": artifact.manifest.kv_bytes(),
        "prefill_seconds": made.prefill_seconds,
    }


def precomputed_table(made: list["Precomputed"]) -> "Table":
    """What `precompute` made."""
    table = plain_table("artifact", "tokens", "blocks", "size", "prefill", "tokens/s")
    for one in made:
        facts = precomputed_json(one)
        speed = facts["tokens"] / one.prefill_seconds
        numbers = (str(facts["tokens"]), str(facts["blocks"]), megabytes(facts["bytes"]))
        table.add_row(facts["artifact"], *numbers, f"{one.prefill_seconds:.1f} s", f"{speed:.0f}")
    return table


def converted_json(converted: "Converted") -> Json:
    """`convert --json`; `ratio` is what keys, values and state take in the file, to what they are."""
    facts = inspect_json(converted.artifact)
    kept = {name: facts[name] for name in ("artifact", "id", "codec", "bytes", "kv_bytes", "ratio")}
    return kept | {"seconds": converted.seconds}


def converted_table(converted: "Converted") -> "Table":
    """What `convert` made."""
    table = plain_table("artifact", "codec", "size", "KV", "ratio", "time")
    facts = converted_json(converted)
    sizes = (megabytes(facts["bytes"]), megabytes(facts["kv_bytes"]), f"{facts['ratio']:.3f}")
    table.add_row(facts["artifact"], facts["codec"], *sizes, f"{converted.seconds:.1f} s")
    return table


def generation_json(generation: "Generation") -> Json:
    """`generate --json`."""
    return asdict(generation)


def generation_line(generation: "Generation") -> str:
    """The last line of `generate`."""
    return (
        f"{generation.cached_tokens} cached tokens, {generation.computed_tokens} computed; "
        f"load {generation.load_seconds:.3f} s, first token {generation.first_token_seconds:.3f} s, "
        f"{generation.decode_tokens_per_second:.1f} tokens/s"
    )


def inspect_json(artifact: "Artifact") -> Json:
    """`inspect --json`: the manifest and sizes."""
    manifest = artifact.manifest
    return {
        "artifact": str(artifact.path),
        "id": artifact.id,
        "bytes": artifact.header_bytes + manifest.data_bytes(),
        "header_bytes": artifact.header_bytes,
        "codec": manifest.codec_name,
        "kv_bytes": manifest.kv_bytes(),
        "stored_kv_bytes": manifest.stored_kv_bytes(),
        "ratio": manifest.stored_kv_bytes() / manifest.kv_bytes(),
        "bytes_per_token": manifest.kv_bytes() // manifest.document.tokens,
        "manifest": manifest.model_dump(mode="json"),
    }


def inspect_table(artifact: "Artifact") -> "Table":
    """What an artifact says about itself."""
    manifest, facts = artifact.manifest, inspect_json(artifact)
    document, profile, fingerprint = manifest.document, manifest.profile, manifest.fingerprint
    table = plain_table("artifact", artifact.path.name)
    revision = f" @ {manifest.model.revision[:12]}" if manifest.model.revision else ""
    kinds = [layer.kind for layer in manifest.layers]
    sizes = f"{megabytes(facts['bytes'])}, KV {megabytes(facts['kv_bytes'])}, {facts['bytes_per_token']} bytes a token"
    ratio = "" if manifest.codec == "raw" else f", {facts['ratio']:.3f} of the KV's size"
    machine = f"{profile.device}, {profile.processor}, torch {profile.torch}, transformers {profile.transformers}"
    rows = {
        "id": artifact.id,
        "made": f"{manifest.created} by {manifest.producer}",
        "document": f"{document.name}{' (in the chat template)' if document.chat else ''}, {document.tokens} tokens",
        "size": f"{sizes} (codec {facts['codec']}{ratio})",
        "blocks": f"{len(manifest.blocks)} of {profile.block_size} tokens; the last has id {manifest.blocks[-1].id}",
        "layers": ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        "model": f"{manifest.model.name}{revision}, {fingerprint.dtype} (a label; the fingerprint decides)",
        "fingerprint": fingerprint.sha256(),
        "profile": f"{machine}, attention {profile.attention}",
        "receipt": f"{len(manifest.receipt.tokens)} greedy tokens, logits {manifest.receipt.logits[:12]}...",
        **_pack_row(manifest.codec),
        "disclosure": "whoever has this file can read the document: the text is inside, and KV can be inverted",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _pack_row(codec: Codec) -> dict[str, str]:
    """The pack that an artifact is decoded with, and whether it is here."""
    if not isinstance(codec, DenseCodec):
        return {}
    here = "here" if pack_path(codec.pack).is_file() else "not here: kvbuy pack pull REPO, or kvbuy pack add FILE"
    return {"pack": f"{codec.pack} ({here})"}


def verdict_json(verdict: Verdict) -> Json:
    """`verify --json`."""
    facts: Json = {"verdict": verdict.name, "intact": True, "fits": True, "exact": None, "drift": {}}
    match verdict:
        case Damaged():
            facts |= {"intact": False, "fits": None, "reason": verdict.reason}
        case Misfit():
            facts |= {"fits": False, "differences": list(verdict.differences)}
        case Replayed():
            facts |= {"receipt": {"tokens_equal": verdict.tokens, "tokens": verdict.tokens}}
        case Exact() | Inexact() | Wrong():
            exact = verdict.exact
            facts["exact"] = asdict(exact) if exact else None
            facts["drift"] = {mode: asdict(drift) for mode, drift in verdict.drift.items()}
            if isinstance(verdict, Inexact):
                facts["profile"] = list(verdict.profile)
            if isinstance(verdict, Wrong):
                facts["reason"] = verdict.reason
        case _:
            assert_never(verdict)
    return facts


def verdict_table(verdict: Verdict) -> "Table":
    """One table, one verdict."""
    table = plain_table("check", "result", "")
    match verdict:
        case Damaged():
            table.add_row("intact", "no", verdict.reason)
        case Misfit():
            table.add_row("intact", "yes", "every digest matches")
            for difference in verdict.differences:
                table.add_row("fits", "no", difference)
        case Replayed():
            _add_identity(table)
            table.add_row("receipt", "yes", f"{verdict.tokens} tokens and their logits, bit for bit")
        case Exact() | Inexact() | Wrong():
            _add_identity(table)
            if isinstance(verdict, Inexact):
                for difference in verdict.profile:
                    table.add_row("profile", "other", difference)
            if verdict.exact:
                _add_exactness(table, verdict.exact)
            for mode, drift in verdict.drift.items():
                table.add_row(f"drift, {mode}", *_drift_cells(drift))
            if isinstance(verdict, Wrong):
                table.add_row("reason", "", verdict.reason)
        case _:
            assert_never(verdict)
    table.add_section()
    table.add_row("verdict", verdict.name, _meaning(verdict))
    return table


def plain_table(*columns: str) -> "Table":
    """An empty table of the house's look; what does not fit into a column is folded."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def megabytes(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def dollars(usd: float) -> str:
    """Dollars as a person reads them: cents and more in full, less to three digits, millions as M."""
    sign, size = "-" if usd < 0 else "", abs(usd)
    if size >= 1e6:
        return f"{sign}${_decimal(size / 1e6):,.2f} M"
    if size >= 1 or size == 0:
        return f"{sign}${_decimal(size):,.2f}"
    return f"{sign}${_decimal(size):.{2 - math.floor(math.log10(size))}f}"


def _decimal(value: float) -> Decimal:
    """As it is written, not as it is stored: rounding then goes as in the report's script."""
    return Decimal(repr(float(value)))


def bar(share: float, *, width: int, ascii_only: bool) -> str:
    """A bar of `share` of `width` columns, to an eighth of a column where there are blocks for it."""
    eighths = round(min(max(share, 0.0), 1.0) * max(width, 0) * 8)
    if ascii_only:
        return "#" * round(eighths / 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def _add_identity(table: "Table") -> None:
    table.add_row("intact", "yes", "every digest matches")
    table.add_row("fits", "yes", "the model's fingerprint matches")


def _add_exactness(table: "Table", exact: Exactness) -> None:
    yes = {True: "yes", False: "no"}
    blocks = f"{exact.blocks_equal}/{exact.blocks} blocks"
    state = f", {exact.state_equal}/{exact.state} state tensors" if exact.state else ""
    table.add_row(
        "exact: KV", yes[exact.blocks_equal == exact.blocks and exact.state_equal == exact.state], blocks + state
    )
    logits = f"{exact.tokens_equal}/{exact.tokens} tokens, max logit difference {exact.max_abs_logit_diff:.4g}"
    table.add_row("exact: continuing", yes[exact.logits_equal], logits)
    table.add_row("exact: receipt", yes[exact.receipt_equal], "the publisher's tokens and logits")


def _drift_cells(drift: Drift) -> tuple[str, str]:
    parted = "" if drift.first_divergence is None else f", parts at token {drift.first_divergence}"
    distance = f"max logit difference {drift.max_abs_logit_diff:.4g}, KL {drift.kl:.2g}"
    return (
        "none" if drift.max_abs_logit_diff == 0 else "some"
    ), f"{distance}, {drift.tokens_equal}/{drift.tokens} tokens{parted}"


def _meaning(verdict: Verdict) -> str:
    match verdict:
        case Exact():
            return "a prefill from scratch in a fresh process gives the same bits"
        case Replayed():
            return (
                "the publisher's receipt comes out; the blocks were not computed again (that is verify without --quick)"
            )
        case Inexact():
            return "made on another profile: bits differ, by the distance above"
        case Wrong():
            return "not that document's KV under this model"
        case Damaged():
            return "do not use it; fetch it again"
        case Misfit():
            return "it belongs to another model"
        case _:
            assert_never(verdict)


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value
