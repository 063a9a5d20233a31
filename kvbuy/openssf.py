"""OpenSSF model signing, for those who use it elsewhere: a sigstore bundle of an artifact's file, beside it.

Keys are its own: PEM files of elliptic curves (not Ed25519). The file that is signed is the one behind any symbolic
link, since the Hub's cache is made of links and links are refused; and nothing beside it is left unsigned or ignored,
since only this one file is looked at. Needs the extra `openssf`.
"""

from pathlib import Path

from kvbuy.artifact import SUFFIX
from kvbuy.errors import DamagedError, StoreError, refuse_without

OPENSSF_SUFFIX = ".kv.openssf.sig"


def openssf_path(artifact: Path) -> Path:
    """Where an artifact's bundle is."""
    return artifact.with_name(artifact.name.removesuffix(SUFFIX) + OPENSSF_SUFFIX)


def sign_openssf(artifact: Path, private_key: Path) -> Path:
    """Sign an artifact's file; the bundle's path.

    Raises:
        UsageError: the extra is not installed.
        StoreError: the key cannot be used (no such file, not an elliptic curve's, encrypted).
    """
    refuse_without("model_signing", "OpenSSL", what="OpenSSF model signing", extra="openssf")
    from model_signing import signing

    path = openssf_path(artifact)
    try:
        signing.Config().use_elliptic_key_signer(private_key=private_key).sign(artifact.resolve(), path)
    except Exception as error:  # the library lets those of several others through
        hint = "it takes a PEM file: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
        raise StoreError(f"{private_key} cannot sign: {error}", hint=hint) from error
    return path


def verify_openssf(artifact: Path, public_key: Path) -> None:
    """Check an artifact's bundle against a public key.

    Raises:
        UsageError: the extra is not installed.
        StoreError: there is no bundle, or the key cannot be read.
        DamagedError: the bundle is not that key's, or not of this file.
    """
    refuse_without("model_signing", "OpenSSL", what="OpenSSF model signing", extra="openssf")
    from model_signing import verifying

    bundle = openssf_path(artifact)
    for path in (bundle, public_key):
        if not path.is_file():
            raise StoreError(f"there is no {path}", hint="kvbuy sign ARTIFACT --openssf KEY.pem makes a bundle")
    try:
        verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(artifact.resolve(), bundle)
    except Exception as error:  # the library lets those of several others through
        raise DamagedError(f"{bundle.name} does not verify with {public_key}: {error}") from error
