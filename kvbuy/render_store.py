"""How the store's answers look: as JSON, and as tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from kvbuy.render import megabytes, plain_table, print_json, print_table

if TYPE_CHECKING:
    from kvbuy.store import Checked, Entry, Freed, Store


def show_entries(store: "Store", entries: "Sequence[Entry]", *, as_json: bool) -> None:
    """Artifacts, and how much of each others need too."""
    uses = Counter(piece.digest for entry in store.entries() for piece in set(entry.pieces))
    facts = [
        {
            "name": entry.name,
            "id": entry.id,
            "bytes": entry.bytes,
            "pieces": len(entry.pieces),
            "shared_bytes": sum(piece.size for piece in entry.pieces if uses[piece.digest] > 1),
            "signed": entry.signatures is not None,
        }
        for entry in entries
    ]
    if as_json:
        print_json({"store": str(store.folder), "artifacts": facts})
        return
    table = plain_table("artifact", "id", "size", "shared", "signed")
    for one in entries:
        shared = sum(piece.size for piece in one.pieces if uses[piece.digest] > 1)
        signed = "yes" if one.signatures is not None else "no"
        table.add_row(one.name, one.id[:12], megabytes(one.bytes), megabytes(shared), signed)
    print_table(table)


def show_freed(freed: "Freed", *, as_json: bool) -> None:
    """What collecting garbage removed."""
    if as_json:
        print_json(asdict(freed))
    else:
        print(f"{freed.objects} objects and {freed.temporaries} unfinished files removed: {megabytes(freed.bytes)}")


def show_checked(found: "Checked", *, as_json: bool) -> None:
    """What a check found."""
    if as_json:
        print_json(asdict(found) | {"sound": found.sound})
        return
    print(f"{found.entries} artifacts, {found.objects} objects, {found.read} of them read in {found.seconds:.1f} s")
    for what, names in (("damaged", found.damaged), ("missing", found.missing), ("unreadable", found.unreadable)):
        for name in names:
            print(f"{what}: {name}")
    print("sound" if found.sound else "not sound: put the artifacts in again that need these")
