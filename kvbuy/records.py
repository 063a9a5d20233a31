"""Small JSON files that may come from strangers: read up to a limit, parsed strictly, refused in our words.

Keys, signatures, evidence and envelopes are such; each knows its own law.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from kvbuy.errors import DamagedError, StoreError
from kvbuy.parts import Part

P = TypeVar("P", bound=Part)


def read_limited(path: Path, *, limit: int) -> bytes:
    """A file's bytes.

    Raises:
        StoreError: it cannot be read.
        DamagedError: it has more than `limit` bytes.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    if len(raw) > limit:
        raise DamagedError(f"{path.name} has more than {limit} bytes, which nothing of its kind has")
    return raw


def parse_record(kind: type[P], raw: bytes, *, name: str) -> P:
    """The record that a file called `name` holds (DamagedError: it holds something else)."""
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))[:80] or "it"
        what = kind.__name__.lower()
        raise DamagedError(f"{name} holds no {what}: {where}: {first['msg'][:200]}") from error


def parse_canonical(kind: type[P], raw: bytes, *, name: str) -> P:
    """`parse_record` of a record that there is one way to write (DamagedError: this is another)."""
    record = parse_record(kind, raw, name=name)
    if record.canonical() != raw:
        raise DamagedError(f"{name} is not canonical JSON", hint="get the file again as it was")
    return record
