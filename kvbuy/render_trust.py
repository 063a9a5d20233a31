"""How signatures, keys, audits and what comes from the Hub look: as JSON, and as tables."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvbuy.render import Json, plain_table, print_json, print_table

if TYPE_CHECKING:
    from kvbuy.evidence import Envelope, Evidence
    from kvbuy.keys import KeyRing, PublicKey
    from kvbuy.pull import Pulled
    from kvbuy.sign import Signer

MEANINGS = {
    "exact": "the blocks that were computed again have the same bits",
    "consistent": "made on another profile, and as near as honest artifacts of that profile are",
    "inconsistent": "not that document's KV under this model",
    "unknown profile": "made on another profile, bits differ, and nobody has measured how far honest ones do",
}


def signer_json(signers: "Sequence[Signer]") -> list[Json]:
    """Who signed, for JSON."""
    return [{"owner": one.key.owner, "key": one.key.id, "trust": one.trust} for one in signers]


def signer_words(signers: "Sequence[Signer]") -> str:
    """Who signed, a line each."""
    return "\n".join(f"signed by: {signer}" for signer in signers) if signers else "not signed"


def show_evidence(found: "Evidence", given: "Evidence | None", path: Path | None, *, as_json: bool) -> int:
    """An audit, and whether it agrees with evidence that was given; the exit code."""
    from kvbuy.evidence import EXIT_CODES

    agrees = None if given is None else found.agrees(given)
    if as_json:
        facts = found.model_dump(mode="json") | {"blocks_checked": len(found.blocks)}
        print_json(facts | {"evidence": None if path is None else str(path), "agrees": agrees})
    else:
        table = plain_table("audit", found.name)
        table.add_row("blocks", f"{', '.join(str(one.index) for one in found.blocks)} of {found.of_blocks}")
        chosen = "" if given is None else " (chosen by whoever made the evidence)"
        table.add_row("seed", f"{found.seed}{chosen}")
        table.add_row("equal", f"{sum(one.equal for one in found.blocks)}/{len(found.blocks)} bit for bit")
        for line in (*found.differences, *found.implausible):
            table.add_row("", line)
        if found.failed_blocks:
            table.add_row("failed", f"blocks {', '.join(map(str, found.failed_blocks))}")
        table.add_section()
        table.add_row("verdict", f"{found.verdict}: {MEANINGS[found.verdict]}")
        if agrees is not None:
            table.add_row("replay", "agrees with the evidence" if agrees else "does not agree with the evidence")
        if path is not None:
            table.add_row("evidence", str(path))
        print_table(table)
    return max(EXIT_CODES[found.verdict], 0 if agrees in (None, True) else 3)


def show_envelope(envelope: "Envelope", path: Path, *, as_json: bool) -> None:
    """A pair of profiles, measured."""
    worst = max(one.worst for one in envelope.tensors)
    mean = max(one.mean for one in envelope.tensors)
    if as_json:
        print_json({"envelope": str(path), "made_from": envelope.made_from, "mean": mean, "worst": worst})
    else:
        print(f"honest vectors of that profile are off by up to {worst:.3g} of their length, {mean:.3g} in the mean")
        print(path)


def show_pulled(found: "Sequence[tuple[Pulled, Sequence[Signer]]]", *, as_json: bool) -> None:
    """What came from the Hub."""
    if as_json:
        artifacts = [
            asdict(one) | {"path": str(one.path), "signatures": signer_json(signers)} for one, signers in found
        ]
        print_json({"artifacts": artifacts})
        return
    table = plain_table("artifact", "blocks", "commit", "signatures")
    for one, signers in found:
        signed = "checked when it is whole: pull it" if one.path.suffix == ".part" else signer_words(signers)
        table.add_row(str(one.path), f"{one.blocks}/{one.of_blocks}", one.commit[:12], signed)
    print_table(table)


def show_keys(ring: "KeyRing", keys: "Sequence[PublicKey]", *, as_json: bool) -> None:
    """Keys, and what they are to this machine."""
    mine = {own.key.id for own in ring.own()}
    facts = [
        {
            "id": key.id,
            "owner": key.owner,
            "own": key.id in mine,
            "trust": ring.judge(key),
            "created": key.created,
            "expires": key.expires,
            "previous": key.previous,
        }
        for key in keys
    ]
    if as_json:
        print_json({"keys": facts})
        return
    table = plain_table("key", "owner", "yours", "trust", "expires")
    for key in keys:
        own = "yes" if key.id in mine else "no"
        table.add_row(key.id[:16], key.owner, own, ring.judge(key), key.expires[:10])
    print_table(table)
