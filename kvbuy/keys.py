"""Keys: who may sign, for how long, and whom this machine trusts.

A key is Ed25519 (RFC 8032). Its public record names an owner, when it was made and when it expires, and is signed by
the key itself; one that rotates another is signed by that one too, and is then trusted as far as it was. A revocation
is signed by the key it revokes. An owner is what the key says of itself: trust is given to keys, by their digest.
It does not know what is signed (`kvbuy.sign`).
"""

import hashlib
import os
from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import AfterValidator, Field, ValidationError

from kvbuy.errors import DamagedError, ExistsError, StoreError, UsageError
from kvbuy.parts import Digest, Label, Part, canonical_json
from kvbuy.records import parse_canonical, read_limited
from kvbuy.whole import write_whole

Trust = Literal["trusted", "unknown", "expired", "revoked"]
Signature = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{85}[AQgw]==\Z")]
KeyBytes = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=\Z")]  # 32 bytes, written one way only
Time = Annotated[
    str,
    Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z"),
    AfterValidator(lambda text: write_time(read_time(text))),  # ValueError: there is no such day
]
MAX_FILE = 100_000  # bytes of a key's file

P = TypeVar("P", bound=Part)


class Record(Part):
    """Something that a key has signed: canonical JSON (RFC 8785), its signature beside it."""

    def signed_bytes(self) -> bytes:
        """What the signatures of a record are over: all of it but them."""
        return canonical_json(self.model_dump(exclude={"signature", "endorsement"}))


class PublicKey(Record):
    """A public key and what it says of itself; `endorsement` is by `previous`, the key that it takes the place of."""

    format: Literal["kvbuy key"] = "kvbuy key"
    version: Literal[1] = 1
    owner: Label
    public: KeyBytes
    created: Time
    expires: Time
    previous: Digest | None
    signature: Signature
    endorsement: Signature | None

    @property
    def id(self) -> str:
        """The SHA-256 of the public key's 32 bytes."""
        return hashlib.sha256(b64decode(self.public)).hexdigest()

    def check(self, signature: str, message: bytes) -> None:
        """Raise DamagedError where a signature is not this key's over a message."""
        try:
            Ed25519PublicKey.from_public_bytes(b64decode(self.public)).verify(b64decode(signature), message)
        except (InvalidSignature, ValueError, Base64Error):
            raise DamagedError(f"a signature is not that of the key {self.id[:12]} of {self.owner}") from None


class OwnKey(Part):
    """A key that can sign: its file is for its owner's eyes only."""

    key: PublicKey
    secret: Annotated[KeyBytes, Field(repr=False)]

    def sign(self, message: bytes) -> str:
        """The signature over a message, base64."""
        return b64encode(Ed25519PrivateKey.from_private_bytes(b64decode(self.secret)).sign(message)).decode()


class Revocation(Record):
    """A key's own word that it is not to be trusted any more."""

    format: Literal["kvbuy revocation"] = "kvbuy revocation"
    version: Literal[1] = 1
    key: PublicKey
    revoked: Time
    reason: Label
    signature: Signature


class KeyRing:
    """The keys of this machine: `own` can sign, `trusted` are believed, `revoked` are not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def here(cls) -> Self:
        """`KVBUY_KEYS`, or `kvbuy/keys` in the user's configuration folder."""
        if folder := os.environ.get("KVBUY_KEYS"):
            return cls(Path(folder).expanduser())
        return cls(Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kvbuy" / "keys")

    def own(self) -> tuple[OwnKey, ...]:
        """The keys that can sign here, oldest first."""
        found = (_read(OwnKey, path) for path in self._files("own"))
        return tuple(sorted(found, key=lambda own: own.key.created))

    def trusted(self) -> tuple[PublicKey, ...]:
        """The keys that this machine was told to trust."""
        return tuple(read_key(path) for path in self._files("trusted"))

    def revocations(self) -> tuple[Revocation, ...]:
        """The revocations that this machine knows."""
        return tuple(read_revocation(path) for path in self._files("revoked"))

    def known(self) -> tuple[PublicKey, ...]:
        """One's own keys, those that are trusted, and those that are revoked, each once."""
        keys = (*(own.key for own in self.own()), *self.trusted(), *(one.key for one in self.revocations()))
        return tuple({key.id: key for key in keys}.values())

    def make(self, owner: str, *, days: int, rotate: OwnKey | None = None) -> OwnKey:
        """A new key, kept here; one that takes the place of `rotate` is endorsed by it.

        Raises:
            StoreError: the folder cannot be written.
            UsageError: the owner's name has signs that nobody can see.
        """
        secret = Ed25519PrivateKey.generate()
        now = datetime.now(UTC)
        facts = {
            "owner": owner,
            "public": b64encode(secret.public_key().public_bytes_raw()).decode(),
            "created": write_time(now),
            "expires": write_time(now + timedelta(days=days)),
            "previous": None if rotate is None else rotate.key.id,
        }
        blank = "A" * 86 + "=="
        try:
            unsigned = PublicKey.model_validate(facts | {"signature": blank, "endorsement": None}).signed_bytes()
        except ValidationError as error:
            raise UsageError(f"a key cannot belong to {owner!r}: {error.errors()[0]['msg']}") from error
        raw = b64encode(secret.private_bytes_raw()).decode()
        signature = b64encode(secret.sign(unsigned)).decode()
        endorsement = None if rotate is None else rotate.sign(unsigned)
        key = PublicKey.model_validate(facts | {"signature": signature, "endorsement": endorsement})
        own = OwnKey(key=key, secret=raw)
        self._write("own", key.id, own)
        return own

    def choose(self, name: str | None) -> OwnKey:
        """The key of one's own whose id or owner begins so, the newest where several do or None is named.

        Raises:
            UsageError: there is none, or it has expired or was revoked.
        """
        named = [
            own for own in self.own() if name is None or own.key.id.startswith(name) or own.key.owner.startswith(name)
        ]
        if not named:
            what = "no key to sign with" if name is None else f"no key {name!r} of yours"
            raise UsageError(
                f"there is {what}", hint='kvbuy keys ls shows yours, kvbuy keys new --owner "NAME" makes one'
            )
        usable = [own for own in named if self.judge(own.key) == "trusted"]
        if not usable:
            trust = self.judge(named[-1].key)
            raise UsageError(f"your key {named[-1].key.id[:12]} is {trust}", hint='kvbuy keys new --owner "NAME"')
        return usable[-1]

    def own_by_id(self, name: str) -> OwnKey:
        """The key of one's own whose id begins so, expired or not (UsageError: there is none, or several)."""
        found = [own for own in self.own() if own.key.id.startswith(name)]
        if len(found) != 1:
            raise UsageError(f"{len(found)} keys of yours begin with {name!r}", hint="kvbuy keys ls")
        return found[0]

    def accept(self, record: "PublicKey | Revocation") -> PublicKey:
        """Trust a key, or believe a revocation; the key that it is about (StoreError)."""
        if isinstance(record, Revocation):
            self.note_revocation(record)
            return record.key
        self.trust(record)
        return record

    def trust(self, key: PublicKey) -> None:
        """Trust a key from now on (StoreError)."""
        self._write("trusted", key.id, key)

    def distrust(self, name: str) -> PublicKey:
        """Trust a key no more (UsageError: no trusted key's id begins so, or several do)."""
        found = [key for key in self.trusted() if key.id.startswith(name)]
        if len(found) != 1:
            raise UsageError(f"{len(found)} trusted keys begin with {name!r}", hint="kvbuy keys ls")
        (self.folder / "trusted" / f"{found[0].id}.json").unlink()
        return found[0]

    def revoke(self, own: OwnKey, reason: str) -> Revocation:
        """Revoke a key of one's own, here; the record is for everybody who trusts it."""
        facts = {"key": own.key, "revoked": write_time(datetime.now(UTC)), "reason": reason}
        try:
            unsigned = Revocation.model_validate(facts | {"signature": "A" * 86 + "=="}).signed_bytes()
        except ValidationError as error:
            raise UsageError(f"that is no reason: {error.errors()[0]['msg']}") from error
        record = Revocation.model_validate(facts | {"signature": own.sign(unsigned)})
        self.note_revocation(record)
        return record

    def note_revocation(self, record: Revocation) -> None:
        """Believe a revocation from now on (StoreError)."""
        self._write("revoked", record.key.id, record)

    def judge(self, key: PublicKey) -> Trust:
        """Whether a key is trusted now: by itself, as one's own, or because a trusted one endorsed it in its place.

        A key that is known here expires as it was known: whoever has stolen it cannot write it a longer life. One that
        has expired or was revoked endorses nobody.

        Raises:
            DamagedError: its endorsement is not that key's.
        """
        revoked = {record.key.id for record in self.revocations()}
        known = {one.id: one for one in (*self.trusted(), *(own.key for own in self.own()))}
        if key.id in revoked:
            return "revoked"
        if _is_over(key) or (key.id in known and _is_over(known[key.id])):
            return "expired"
        if key.id in known:
            return "trusted"
        before = known.get(key.previous or "")
        if before is None or before.id in revoked or _is_over(before) or key.endorsement is None:
            return "unknown"
        before.check(key.endorsement, key.signed_bytes())
        return "trusted"

    def _files(self, kind: str) -> list[Path]:
        return sorted((self.folder / kind).glob("*.json"))

    def _write(self, kind: str, name: str, record: Part) -> None:
        path = self.folder / kind / f"{name}.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"cannot make {path.parent}: {error.strerror}", hint="set KVBUY_KEYS") from error
        with write_whole(path) as file:
            os.chmod(file.name, 0o600)
            file.write(canonical_json(record.model_dump()))


def _is_over(key: PublicKey) -> bool:
    return datetime.now(UTC) >= read_time(key.expires)


def read_key(path: Path) -> PublicKey:
    """A public key's file, its own signature checked.

    Raises:
        StoreError: it cannot be read.
        DamagedError: it is something else, or its signature is not its own.
    """
    key = _read(PublicKey, path)
    key.check(key.signature, key.signed_bytes())
    return key


def read_revocation(path: Path) -> Revocation:
    """A revocation's file, signed by the key that it revokes (errors: `read_key`)."""
    record = _read(Revocation, path)
    record.key.check(record.signature, record.signed_bytes())
    return record


def read_record(path: Path) -> PublicKey | Revocation:
    """A public key's file or a revocation's (errors: `read_key`)."""
    try:
        return read_revocation(path)
    except DamagedError:
        return read_key(path)


def write_record(record: Record, path: Path, *, force: bool = False) -> None:
    """Write what everybody may see of a key (ExistsError, StoreError)."""
    if path.exists() and not force:
        raise ExistsError(f"{path} is there already", hint="give --force to replace it, or --out for another name")
    with write_whole(path) as file:
        file.write(canonical_json(record.model_dump()))


def write_time(moment: datetime) -> str:
    """A moment in UTC, to the second."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def read_time(text: str) -> datetime:
    """The moment that `write_time` wrote."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _read(kind: type[P], path: Path) -> P:
    return parse_canonical(kind, read_limited(path, limit=MAX_FILE), name=path.name)
