"""What can go wrong, as one tree.

    KvbuyError                 exit 1   something failed
    +-- UsageError             exit 2   the request contradicts itself
    +-- DocumentError          exit 1   the document cannot be prefilled: empty, not UTF-8, too long
    +-- ModelError             exit 1   the model cannot be found, read or run
    |   +-- UnsupportedCache   exit 1   its cache holds something that an artifact cannot store
    +-- StoreError             exit 1   a file cannot be found, read or written
    |   +-- ExistsError        exit 1   it is there already
    |   +-- PackError          exit 1   the pack that decodes an artifact is not here
    +-- DamagedError           exit 3   the artifact breaks the format law, a digest or a signature
    +-- UntrustedError         exit 3   nobody whom this machine trusts has signed it
    +-- MisfitError            exit 4   the artifact belongs to another model

Expected outcomes are not here: verification returns a value (`kvbuy.verdict`). Only `kvbuy.cli.main` catches.
"""

from importlib.util import find_spec
from typing import ClassVar


class KvbuyError(Exception):
    """The root of every failure that kvbuy raises on purpose.

    Attributes:
        message: what is wrong, in one sentence.
        hint: what to do next, or None where nothing helps.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ProfileWarning(UserWarning):
    """An artifact was made on another profile: it may be loaded, its bits are not promised."""


class OfflineWarning(UserWarning):
    """Something was taken from a cache, since its source is out of reach."""


class UsageError(KvbuyError):
    """The request contradicts itself."""

    exit_code = 2


class DocumentError(KvbuyError):
    """The document or prompt cannot be used: empty, not UTF-8, too long for the model."""


class ModelError(KvbuyError):
    """The model cannot be found, read or run."""


class UnsupportedCache(ModelError):
    """The model keeps a kind of cache that an artifact cannot store."""


class StoreError(KvbuyError):
    """A file cannot be found, read or written."""


class ExistsError(StoreError):
    """The file to be written is there already."""


class PackError(StoreError):
    """The pack that an artifact's codec needs is not here."""


class DamagedError(KvbuyError):
    """The artifact breaks the format law, or its bytes do not match their digest."""

    exit_code = 3


class UntrustedError(KvbuyError):
    """A signature was asked for, and nobody whom this machine trusts has signed the artifact."""

    exit_code = 3


class MisfitError(KvbuyError):
    """The artifact was made with another model.

    Attributes:
        differences: the parts of the fingerprint that differ, one sentence each.
    """

    exit_code = 4

    def __init__(self, message: str, *, differences: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.differences = differences


def refuse_without(*packages: str, what: str, extra: str) -> None:
    """Raise UsageError where a package of an extra is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise UsageError(f"{what} needs {package}, which is not here", hint=f"pip install 'kvbuy[{extra}]'")
