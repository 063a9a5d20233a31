"""Signatures: who answers for an artifact, beside it in NAME.kv.sig.json.

The payload is the manifest's canonical bytes, which hold every digest of the file; the envelope is DSSE
(github.com/secure-systems-lab/dsse, protocol.md): a signature is over "DSSEv1", the lengths, the payload's type and
the payload. Each signature brings its key's public record, so that an unknown signer has a name. Whether that key is
trusted is the key ring's word (`kvbuy.keys`).
"""

from base64 import b64decode, b64encode
from binascii import Error as Base64Error
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from kvbuy.artifact import SUFFIX, Artifact
from kvbuy.errors import DamagedError, UntrustedError
from kvbuy.keys import KeyRing, OwnKey, PublicKey, Signature, Trust
from kvbuy.parts import Part
from kvbuy.records import parse_canonical, read_limited
from kvbuy.whole import write_whole

SIGNATURE_SUFFIX = ".kv.sig.json"
PAYLOAD_TYPE: Literal["application/vnd.kvbuy.manifest+json"] = "application/vnd.kvbuy.manifest+json"
MOST_SIGNATURES = 16
MAX_FILE = 200_000_000  # bytes: a manifest's, and a third more for base64


class Signed(Part):
    """A signature of an envelope, and the record of the key that made it."""

    keyid: str
    sig: Signature
    key: PublicKey


class Envelope(Part):
    """DSSE."""

    payload: str
    payloadType: Literal["application/vnd.kvbuy.manifest+json"]
    signatures: Annotated[tuple[Signed, ...], Field(min_length=1, max_length=MOST_SIGNATURES)]


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose signature an artifact has, and whether that key is trusted here; the owner is what the key says."""

    key: PublicKey
    trust: Trust

    def __str__(self) -> str:
        return f"{self.trust} key {self.key.id[:12]}, which says that it is of {self.key.owner!r}"


def signature_path(artifact: Path) -> Path:
    """Where an artifact's signatures are."""
    return artifact.with_name(artifact.name.removesuffix(SUFFIX) + SIGNATURE_SUFFIX)


def sign_artifact(artifact: Artifact, own: OwnKey) -> Path:
    """Sign an artifact, beside signatures that it has already; one by the same key is made anew.

    Raises:
        DamagedError: a signature that is there is not its key's.
        StoreError: they cannot be written.
    """
    path = signature_path(artifact.path)
    before = (
        _parse_envelope(read_signatures(path), artifact).signatures if find_signers(artifact, KeyRing.here()) else ()
    )
    mine = Signed(keyid=own.key.id, sig=own.sign(_message(artifact)), key=own.key)
    others = tuple(one for one in before if one.key.id != own.key.id)
    envelope = Envelope(
        payload=b64encode(artifact.manifest.canonical()).decode(),
        payloadType=PAYLOAD_TYPE,
        signatures=(*others, mine),
    )
    with write_whole(path) as file:
        file.write(envelope.canonical())
    return path


def find_signers(artifact: Artifact, ring: KeyRing) -> tuple[Signer, ...]:
    """Whose signatures an artifact has, each checked; none where none of its own are beside it.

    Raises:
        DamagedError: a signature is not its key's.
        StoreError: the file cannot be read.
    """
    path = signature_path(artifact.path)
    return judge_signatures(read_signatures(path), artifact, ring) if path.exists() else ()


def check_signers(path: Path, *, required: bool) -> tuple[Artifact | None, tuple[Signer, ...]]:
    """The artifact at a path, opened, and who signed it, before anything else of it is read.

    Whoever goes on with this very artifact reads what was signed, whatever has come to lie under its name since. None
    where the file is no artifact.

    Raises:
        DamagedError: a signature is not its key's; with `required`, the file is no artifact.
        UntrustedError: it is `required`, and nobody whom this machine trusts has signed it.
        StoreError: a file cannot be read.
    """
    try:
        artifact = Artifact.open(path)
    except DamagedError:
        if required:
            raise
        return None, ()  # whoever reads it says so
    signers = find_signers(artifact, KeyRing.here())
    if required:
        require_signature(path.name, signers)
    return artifact, signers


def judge_signatures(raw: bytes, artifact: Artifact, ring: KeyRing) -> tuple[Signer, ...]:
    """Whose signatures an artifact has by a file of signatures, each checked; none where it is another artifact's.

    Raises:
        DamagedError: it is no file of signatures, or one in it is not its key's.
    """
    envelope = _parse_envelope(raw, artifact)
    if b64decode(envelope.payload) != artifact.manifest.canonical():
        return ()
    signers = []
    for one in envelope.signatures:
        one.key.check(one.key.signature, one.key.signed_bytes())
        if one.keyid != one.key.id:
            raise DamagedError(f"{artifact.path.name}: a signature names another key than it brings")
        one.key.check(one.sig, _message(artifact))
        signers.append(Signer(key=one.key, trust=ring.judge(one.key)))
    return tuple(signers)


def require_signature(name: str, signers: tuple[Signer, ...]) -> None:
    """Raise UntrustedError where none of the signers of the artifact called `name` is trusted."""
    if any(signer.trust == "trusted" for signer in signers):
        return
    if not signers:
        raise UntrustedError(
            f"{name} is not signed",
            hint=f"its publisher can: kvbuy sign {name}; or leave out --require-signature",
        )
    unknown = any(signer.trust == "unknown" for signer in signers)
    raise UntrustedError(
        f"{name} is signed by nobody whom you trust: {'; '.join(map(str, signers))}",
        hint="if you know that key: kvbuy keys trust KEY.json (its owner's file)"
        if unknown
        else "ask its publisher for one that is signed with a key that lives",
    )


def _message(artifact: Artifact) -> bytes:
    """What is signed: DSSE's pre-authentication encoding of the manifest."""
    kind, payload = PAYLOAD_TYPE.encode(), artifact.manifest.canonical()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def read_signatures(path: Path) -> bytes:
    """A file of signatures, whoever it is from (StoreError, DamagedError: it is too long)."""
    return read_limited(path, limit=MAX_FILE)


def _parse_envelope(raw: bytes, artifact: Artifact) -> Envelope:
    name = signature_path(artifact.path).name
    envelope = parse_canonical(Envelope, raw, name=name)
    try:
        payload = b64decode(envelope.payload, validate=True)
    except Base64Error as error:
        raise DamagedError(f"{name}: its payload is not base64") from error
    if b64encode(payload).decode() != envelope.payload:
        raise DamagedError(f"{name} is not canonical base64", hint="get the file again as it was")
    return envelope
