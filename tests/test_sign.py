"""Signatures and keys: who signed, whether that key is trusted, and every way in which it is not."""

import json
from base64 import b64decode
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import Ran, Run
from handmade import FULL, handmade
from test_store import faults

from kvbuy.artifact import Artifact, write_artifact
from kvbuy.errors import DamagedError, StoreError, UntrustedError, UsageError
from kvbuy.keys import KeyRing, OwnKey, read_record, write_record, write_time
from kvbuy.sign import Signer, check_signers, find_signers, require_signature, sign_artifact, signature_path


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "doc.kv.safetensors", *handmade(layers=[FULL]))


@pytest.fixture
def publisher(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "publisher")


@pytest.fixture
def buyer(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "buyer")


@pytest.fixture
def own(publisher: KeyRing) -> OwnKey:
    return publisher.make("Ann", days=30)


def trust_of(artifact: Artifact, ring: KeyRing) -> list[str]:
    return [signer.trust for signer in find_signers(artifact, ring)]


def let_pass(monkeypatch: pytest.MonkeyPatch, *, days: int) -> None:
    """Let so many days go by for keys."""
    later = datetime.now(UTC) + timedelta(days=days)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return later

    monkeypatch.setattr("kvbuy.keys.datetime", Later)


def test_a_signature_is_known_by_its_key(artifact: Artifact, own: OwnKey, publisher: KeyRing, buyer: KeyRing) -> None:
    sign_artifact(artifact, own)
    assert trust_of(artifact, publisher) == ["trusted"]
    assert find_signers(artifact, buyer) == (Signer(key=own.key, trust="unknown"),)
    buyer.trust(own.key)
    assert trust_of(artifact, buyer) == ["trusted"]
    buyer.distrust(own.key.id[:8])
    assert trust_of(artifact, buyer) == ["unknown"]


def test_nothing_beside_an_artifact_means_not_signed(artifact: Artifact, buyer: KeyRing) -> None:
    assert find_signers(artifact, buyer) == ()
    with pytest.raises(UntrustedError, match="is not signed"):
        require_signature("doc", ())


def test_several_sign_and_one_signs_again(artifact: Artifact, own: OwnKey, publisher: KeyRing, buyer: KeyRing) -> None:
    other = publisher.make("Bob", days=30)
    for key in (own, other, own):
        sign_artifact(artifact, key)
    assert [signer.key.owner for signer in find_signers(artifact, buyer)] == ["Bob", "Ann"]
    buyer.trust(other.key)
    require_signature("doc", find_signers(artifact, buyer))


def test_a_signature_does_not_pass_to_another_artifact(artifact: Artifact, own: OwnKey, tmp_path: Path) -> None:
    sign_artifact(artifact, own)
    other = write_artifact(tmp_path / "other.kv.safetensors", *handmade(range(20), layers=[FULL]))
    signature_path(other.path).write_bytes(signature_path(artifact.path).read_bytes())
    assert find_signers(other, KeyRing(tmp_path)) == ()


def test_every_flipped_bit_of_a_signature_file_is_seen(artifact: Artifact, own: OwnKey, publisher: KeyRing) -> None:
    """There is one way to write a signature: no bit of its file is free. With another payload it is not signed."""
    path = sign_artifact(artifact, own)
    raw = path.read_bytes()
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        with suppress(DamagedError):
            assert find_signers(artifact, publisher) == ()


def test_signing_that_fails_anywhere_leaves_the_signatures_that_were_there(
    artifact: Artifact, own: OwnKey, publisher: KeyRing
) -> None:
    other = publisher.make("Bob", days=1)
    for at in range(1, 20):
        sign_artifact(artifact, own)
        with faults(at) as counter, suppress(StoreError):
            sign_artifact(artifact, other)
        assert [signer.key.owner for signer in find_signers(artifact, publisher)] in (["Ann"], ["Ann", "Bob"])
        if not counter.fired:
            break
        signature_path(artifact.path).unlink()
    assert at > 4
    assert trust_of(artifact, publisher) == ["trusted", "trusted"]


def test_an_expired_key_is_not_trusted(artifact: Artifact, publisher: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    own = publisher.make("Ann", days=1)
    sign_artifact(artifact, own)
    let_pass(monkeypatch, days=2)
    assert trust_of(artifact, publisher) == ["expired"]
    with pytest.raises(UsageError, match="is expired"):
        publisher.choose(None)


def test_a_key_is_chosen_by_how_its_id_or_owner_begins(publisher: KeyRing, own: OwnKey) -> None:
    assert publisher.choose("An") == publisher.choose(own.key.id[:6]) == own
    with pytest.raises(UsageError, match="no key 'Bob' of yours"):
        publisher.choose("Bob")


def test_whoever_stole_an_expired_key_cannot_write_it_a_longer_life(
    artifact: Artifact, buyer: KeyRing, own: OwnKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    buyer.trust(own.key)
    longer = own.key.model_copy(update={"expires": "2999-01-01T00:00:00Z"})
    longer = longer.model_copy(update={"signature": own.sign(longer.signed_bytes())})
    sign_artifact(artifact, OwnKey(key=longer, secret=own.secret))
    assert trust_of(artifact, buyer) == ["trusted"]
    let_pass(monkeypatch, days=31)
    assert trust_of(artifact, buyer) == ["expired"]


def test_a_name_cannot_speak_for_a_key(artifact: Artifact, publisher: KeyRing, buyer: KeyRing) -> None:
    sign_artifact(artifact, publisher.make("Ann, key 4f2c9a1b7d3e (trusted); Mallory\u200b", days=1))
    [signer] = find_signers(artifact, buyer)
    assert str(signer).startswith("unknown key ")
    assert "\\u200b" in str(signer)


def test_a_day_that_does_not_exist_is_damage(own: OwnKey, publisher: KeyRing, tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    write_record(own.key, path)
    path.write_bytes(path.read_bytes().replace(own.key.expires.encode(), b"9999-99-99T99:99:99Z"))
    with pytest.raises(DamagedError):
        read_record(path)


def test_a_rotated_key_is_trusted_as_the_one_before_it(
    artifact: Artifact, own: OwnKey, publisher: KeyRing, buyer: KeyRing
) -> None:
    new = publisher.make("Ann", days=30, rotate=own)
    sign_artifact(artifact, new)
    assert trust_of(artifact, buyer) == ["unknown"]
    buyer.trust(own.key)
    assert trust_of(artifact, buyer) == ["trusted"]
    buyer.note_revocation(publisher.revoke(own, "stolen"))
    assert trust_of(artifact, buyer) == ["unknown"]


def test_an_endorsement_that_is_forged_is_damage(
    artifact: Artifact, own: OwnKey, publisher: KeyRing, buyer: KeyRing
) -> None:
    thief = KeyRing(buyer.folder.parent / "thief")
    stranger = thief.make("Ann", days=30)
    forged = thief.make("Ann", days=30, rotate=stranger)
    claimed = forged.key.model_copy(update={"previous": own.key.id})
    honest = claimed.model_copy(update={"signature": forged.sign(claimed.signed_bytes())})
    sign_artifact(artifact, OwnKey(key=honest, secret=forged.secret))
    buyer.trust(own.key)
    with pytest.raises(DamagedError, match="not that of the key"):
        find_signers(artifact, buyer)


def test_a_revoked_key_is_trusted_no_more(
    artifact: Artifact, own: OwnKey, publisher: KeyRing, buyer: KeyRing, tmp_path: Path
) -> None:
    sign_artifact(artifact, own)
    buyer.trust(own.key)
    write_record(publisher.revoke(own, "laptop stolen"), tmp_path / "revoked.json")
    record = read_record(tmp_path / "revoked.json")
    assert buyer.accept(record) == own.key
    assert trust_of(artifact, buyer) == trust_of(artifact, publisher) == ["revoked"]


def test_nobody_else_can_revoke_a_key(own: OwnKey, publisher: KeyRing, tmp_path: Path) -> None:
    thief = KeyRing(tmp_path / "thief").make("Mallory", days=30)
    forged = publisher.revoke(own, "?").model_copy(update={"signature": thief.sign(b"anything")})
    write_record(forged, tmp_path / "forged.json")
    with pytest.raises(DamagedError):
        read_record(tmp_path / "forged.json")


def test_secrets_are_for_their_owner_s_eyes(own: OwnKey, publisher: KeyRing, tmp_path: Path) -> None:
    path = publisher.folder / "own" / f"{own.key.id}.json"
    assert path.stat().st_mode & 0o077 == 0
    assert own.secret not in repr(own)
    write_record(own.key, tmp_path / "ann.json")
    assert own.secret not in (tmp_path / "ann.json").read_text()


def test_the_envelope_is_dsse(artifact: Artifact, own: OwnKey) -> None:
    envelope = json.loads(sign_artifact(artifact, own).read_bytes())
    assert b64decode(envelope["payload"]) == artifact.manifest.canonical()
    assert envelope["payloadType"] == "application/vnd.kvbuy.manifest+json"
    assert envelope["signatures"][0]["keyid"] == own.key.id
    payload = b64decode(envelope["payload"])
    message = b"DSSEv1 35 application/vnd.kvbuy.manifest+json %d %b" % (len(payload), payload)
    own.key.check(envelope["signatures"][0]["sig"], message)


def test_a_damaged_artifact_is_left_to_who_reads_it(artifact: Artifact) -> None:
    artifact.path.write_bytes(b"nothing")
    assert check_signers(artifact.path, required=False) == (None, ())
    with pytest.raises(DamagedError):
        check_signers(artifact.path, required=True)


def test_an_owner_with_unseen_signs_is_refused(publisher: KeyRing) -> None:
    with pytest.raises(UsageError, match="a key cannot belong to"):
        publisher.make("Ann\x1b[2J", days=1)


def test_times_are_written_to_the_second() -> None:
    assert write_time(datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)) == "2026-01-02T03:04:05Z"


@pytest.fixture
def ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KeyRing:
    monkeypatch.setenv("KVBUY_KEYS", str(tmp_path / "keys"))
    return KeyRing.here()


def test_the_verbs_sign_and_say_who_did(run: Run, precomputed: Ran, ring: KeyRing) -> None:
    assert run("sign").code == 2
    made = run("keys", "new", "--owner", "Ann", "--json").json["keys"][0]
    assert (made["own"], made["trust"]) == (True, "trusted")
    assert run("sign").out.strip() == "doc.kv.sig.json"
    shown = run("verify", "--model", "model", "--quick")
    assert f"signed by: trusted key {made['id'][:12]}, which says that it is of 'Ann'" in shown.err
    checked = run("verify", "--model", "model", "--quick", "--require-signature", "--json").json
    assert [one["owner"] for one in checked["signatures"]] == ["Ann"]
    options = ("--prompt", "x", "--model", "model", "--max-new-tokens", "2", "--json")
    assert run("generate", *options, "--require-signature").json["signatures"][0]["key"] == made["id"]


def test_an_unsigned_artifact_is_refused_where_a_signature_is_asked_for(
    run: Run, precomputed: Ran, ring: KeyRing
) -> None:
    for verb in (("verify",), ("generate", "--prompt", "x")):
        ran = run(*verb, "--model", "model", "--require-signature")
        assert (ran.code, ran.out) == (3, "")
        assert "is not signed" in ran.err


def test_keys_go_from_hand_to_hand(
    run: Run, precomputed: Ran, ring: KeyRing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("keys", "new", "--owner", "Ann")
    run("sign")
    exported = run("keys", "export").out.strip()
    revoked = run("keys", "revoke", ring.own()[0].key.id[:10], "--reason", "moved on").out.strip()
    monkeypatch.setenv("KVBUY_KEYS", str(tmp_path / "buyer"))
    unknown = run("verify", "--model", "model", "--quick", "--require-signature")
    assert "signed by nobody whom you trust: unknown key" in unknown.err
    assert run("keys", "trust", exported, "--json").json["keys"][0]["trust"] == "trusted"
    assert run("verify", "--model", "model", "--quick", "--require-signature").code == 0
    assert run("keys", "trust", revoked, "--json").json["keys"][0]["trust"] == "revoked"
    refused = run("verify", "--model", "model", "--quick", "--require-signature")
    assert (refused.code, "signed with a key that lives" in refused.err) == (3, True)
    assert [key["owner"] for key in run("keys", "ls", "--json").json["keys"]] == ["Ann"]


def make_pem(folder: Path, name: str) -> tuple[Path, Path]:
    """A private and a public key of an elliptic curve, as PEM files."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    paths = (folder / f"{name}.pem", folder / f"{name}.pub.pem")
    paths[0].write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    paths[1].write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return paths


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_openssf_signs_the_file_behind_a_link_and_sees_a_changed_byte(
    run: Run, precomputed: Ran, ring: KeyRing, tmp_path: Path
) -> None:
    pytest.importorskip("model_signing")
    private, public = make_pem(tmp_path, "ann")
    _, stranger = make_pem(tmp_path, "bob")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "doc.kv.safetensors").symlink_to(tmp_path / "doc.kv.safetensors")
    signed = run("sign", "link/doc.kv.safetensors", "--openssf", str(private))
    assert (signed.code, signed.out.strip()) == (0, "link/doc.kv.openssf.sig"), signed.err
    checked = ("verify", "link/doc.kv.safetensors", "--model", "model", "--quick", "--openssf")
    assert run(*checked, str(public)).code == 0
    assert run(*checked, str(stranger)).code == 3
    assert run(*checked, str(tmp_path / "none.pem")).code == 1
    raw = bytearray((tmp_path / "doc.kv.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "doc.kv.safetensors").write_bytes(raw)
    assert run(*checked, str(public)).code == 3
    assert run("sign", "--openssf", str(public)).code in (1, 3)
