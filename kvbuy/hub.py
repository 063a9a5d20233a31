"""The Hugging Face Hub: the only user of huggingface_hub, whose errors become ours here.

It moves files and commits; what is in them is `kvbuy.publish`'s and `kvbuy.pull`'s business.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvbuy.errors import ModelError, OfflineWarning, StoreError, UsageError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"]
ADDRESS = "hf://"
TRIES = 4
FIRST_PAUSE = 0.5  # seconds, doubled after each try
BUSY = (429, 500, 502, 503, 504)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """hf://USER/NAME[@REVISION][/FILE]: a repository, one of its revisions, a file of it; None where not said."""

    repo: str
    revision: str | None
    name: str | None


@dataclass(frozen=True, slots=True)
class Pinned:
    """A repository at one commit (40 hex digits); `offline` where the Hub is out of reach and its cache is asked."""

    repo: str
    commit: str
    files: tuple[str, ...]
    offline: bool = False


def parse_address(text: str) -> Address:
    """An address, its hf:// left out or not (UsageError: it names no repository)."""
    path = text.removeprefix(ADDRESS)
    user, _, rest = path.partition("/")
    repo, _, name = rest.partition("/")
    repo, _, revision = repo.partition("@")
    if not user or not repo:
        raise UsageError(f"{text!r} names no repository", hint="USER/NAME, or hf://USER/NAME@REVISION/FILE")
    return Address(repo=f"{user}/{repo}", revision=revision or None, name=name or None)


def fetch_model(repo: str, *, revision: str | None = None, offline: bool = False) -> Path:
    """The local snapshot folder of a model repository; downloads what is missing, unless `offline`.

    Raises:
        ModelError: no such repository or revision, gated, or not here and the Hub is out of reach.
    """
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=MODEL_FILES, local_files_only=offline)
    except errors.GatedRepoError as error:
        hint = "accept its terms on the Hub, then run: hf auth login"
        raise ModelError(f"the model {repo} is gated", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"the model {repo} has no revision {revision}", hint="check --model ID@REVISION") from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the spelling; a private model needs: hf auth login"
        raise ModelError(f"there is no model {repo} on the Hub, nor a folder of that name", hint=hint) from error
    except errors.HFValidationError as error:
        hint = "give --model a Hub id such as Qwen/Qwen3-4B, or a local folder"
        raise ModelError(f"{repo!r} is neither a folder nor a Hub id", hint=hint) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        hint = "check the connection, or give --model a local folder"
        raise ModelError(f"the model {repo} is not on this machine, and the Hub is out of reach", hint=hint) from error
    except Exception as error:  # a download that breaks midway lets its HTTP library's errors through
        raise ModelError(f"the download of {repo} broke off: {error}", hint="try again: it resumes") from error
    return Path(folder)


def pin(repo: str, revision: str | None = None) -> Pinned:
    """A repository's commit and files now; where the Hub is out of reach, what its cache has of it.

    Raises:
        StoreError: no such repository or revision, not for you, or out of reach and not in the cache.
    """
    from huggingface_hub import HfApi, errors

    try:
        info = _reach(repo, lambda: HfApi().model_info(repo, revision=revision))
    except StoreError as error:
        offline = isinstance(error.__cause__, errors.OfflineModeIsEnabled)
        if (offline or _is_line(error.__cause__)) and (cached := _find_cached(repo, revision)):
            words = f"the Hub is out of reach: {repo} is taken from its cache, as of {cached.commit[:12]}"
            warnings.warn(words, OfflineWarning, stacklevel=2)
            return cached
        raise
    files = tuple(sibling.rfilename for sibling in info.siblings or ())
    return Pinned(repo, str(info.sha), files)


def _find_cached(repo: str, revision: str | None) -> Pinned | None:
    """What the Hub's cache has of a repository: that revision, or the one that came last."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = [one for one in scan_cache_dir().repos if (one.repo_type, one.repo_id) == ("model", repo)]
    except CacheNotFound:
        return None
    found = [
        one
        for held in repos
        for one in held.revisions
        if revision in one.refs
        or one.commit_hash == revision
        or (revision is None and not any(ref.startswith("refs/") for ref in one.refs))
    ]
    if not found:
        return None
    newest = max(found, key=lambda one: one.last_modified)
    return Pinned(repo, newest.commit_hash, tuple(file.file_name for file in newest.files), offline=True)


def download(pinned: Pinned, name: str, *, again: bool = False) -> Path:
    """A file of a repository at its commit, in the Hub's own cache; resumes; `again` fetches it anew (StoreError)."""
    from huggingface_hub import hf_hub_download

    return _reach(
        pinned.repo,
        lambda: Path(
            hf_hub_download(
                pinned.repo, name, revision=pinned.commit, force_download=again, local_files_only=pinned.offline
            )
        ),
    )


def read_range(pinned: Pinned, name: str, start: int, size: int) -> bytes:
    """Bytes of a file of a repository at its commit (StoreError)."""
    from huggingface_hub import HfFileSystem

    path = f"{pinned.repo}@{pinned.commit}/{name}"
    data: bytes = _reach(pinned.repo, lambda: HfFileSystem().cat_file(path, start=start, end=start + size))
    return data


def publish(
    repo: str,
    files: Mapping[str, bytes | Path],
    *,
    message: str,
    parent: str | None,
    stale: Sequence[str] = (),
) -> str:
    """Upload files, large ones first and apart, and show them all in one commit on top of `parent`; its address.

    The same commit takes away the files that are `stale`. Readers see all of it or nothing, and what a broken try has
    uploaded is not sent again.

    Raises:
        StoreError: not for you, out of reach, or somebody else has committed since `parent`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()

    def upload() -> str:
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=what) for name, what in files.items()]
        api.preupload_lfs_files(repo, additions, free_memory=False)
        operations: list[CommitOperationAdd | CommitOperationDelete] = list(additions)
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        done = api.create_commit(repo, operations, commit_message=message, parent_commit=parent)
        return str(done.commit_url)

    return _reach(repo, upload)


def make_repository(repo: str, *, private: bool, gated: bool) -> None:
    """Make a model repository, unless it is there; `gated` asks whoever downloads to accept terms.

    Raises:
        StoreError: not for you or out of reach; or it is to be `private`, and is there as a public one.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    _reach(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    if private and not _reach(repo, lambda: api.model_info(repo)).private:
        hint = "push to another one, or make this one private on its page first"
        raise StoreError(f"{repo} is there already, and everybody can read it", hint=hint)
    if gated:
        _reach(repo, lambda: api.update_repo_settings(repo, gated="auto"))


def card_text(metadata: Mapping[str, Any], body: str) -> str:
    """A model card: its metadata as the Hub wants it, then its text."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\n{body}"


def card_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a model card's file; none where it has none that can be read."""
    from huggingface_hub import metadata_load

    try:
        return dict(metadata_load(path) or {})
    except Exception:  # whatever somebody wrote there, by hand or by program
        return {}


def push_file(path: Path, repo: str) -> str:
    """Upload a file to a model repository, which is made where it is missing; returns the commit's address.

    Raises:
        StoreError: not logged in, no right to write there, or the Hub is out of reach.
    """
    make_repository(repo, private=False, gated=False)
    return publish(repo, {path.name: path}, message=f"Add {path.name}", parent=None)


def list_files(repo: str) -> tuple[str, ...]:
    """The names of a model repository's files (StoreError where it cannot be reached)."""
    return pin(repo).files


def pull_file(repo: str, name: str) -> Path:
    """A file of a model repository, in the Hub's own cache (StoreError where it cannot be had)."""
    return download(pin(repo), name)


def _reach(repo: str, work: Callable[[], T]) -> T:
    """Do work on a repository, again where the Hub is busy or the line breaks: all of it can be done twice."""
    for left in reversed(range(TRIES)):
        try:
            with _explaining(repo):
                return work()
        except StoreError as error:
            if not left or not _may_pass(error.__cause__):
                raise
            time.sleep(FIRST_PAUSE * 2 ** (TRIES - 1 - left))
    raise AssertionError("the last try returns or raises")


def _may_pass(error: BaseException | None) -> bool:
    response = getattr(error, "response", None)
    return _is_line(error) or getattr(response, "status_code", None) in BUSY


def _is_line(error: BaseException | None) -> bool:
    """Whether it is the line that failed, not the Hub that answered."""
    from huggingface_hub import errors

    answered = isinstance(error, errors.HfHubHTTPError | errors.HFValidationError | errors.OfflineModeIsEnabled)
    return isinstance(error, Exception) and not answered and not isinstance(error, ValueError | TypeError)


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    """Turn what goes wrong between here and a repository into a StoreError that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise StoreError(f"{repo!r} is no Hub id", hint="name a repository as USER/NAME") from error
    except errors.GatedRepoError as error:
        hint = "accept its terms on its page on the Hub, then: hf auth login"
        raise StoreError(f"{repo} is gated", hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise StoreError(
            f"{repo} has no such revision", hint="USER/NAME@REVISION: a branch, a tag, a commit"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise StoreError(f"{repo} has no such file at that revision", hint=f"look: kvbuy pull {repo}") from error
    except (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError) as error:
        hint = "check the spelling; writing, and what is private, needs: hf auth login"
        raise StoreError(f"{repo} is not on the Hub, or not for you", hint=hint) from error
    except errors.OfflineModeIsEnabled as error:
        raise StoreError(f"{repo} cannot be reached: HF_HUB_OFFLINE is set", hint="unset HF_HUB_OFFLINE") from error
    except errors.LocalEntryNotFoundError as error:
        raise StoreError(f"{repo} is not here, and the Hub is out of reach", hint="check the connection") from error
    except errors.HfHubHTTPError as error:
        raise _explain_status(repo, error.response.status_code, str(error).splitlines()[0]) from error
    except Exception as error:  # a broken line lets its HTTP library's errors through
        raise StoreError(f"{repo} cannot be reached: {error}", hint="try again: what came is kept") from error


def _explain_status(repo: str, status: int, words: str) -> StoreError:
    match status:
        case 401 | 403:
            return StoreError(f"{repo} cannot be written or read with your login", hint="hf auth login, as its owner")
        case 409 | 412:
            return StoreError(f"somebody else has changed {repo} meanwhile", hint="push again")
        case 429:
            return StoreError(f"the Hub asks to be left alone for a while: {words}", hint="try again in five minutes")
        case _ if status >= 500:
            return StoreError(f"the Hub is out of order: {words}", hint="try again later: what came is kept")
        case _:
            return StoreError(f"the Hub refused: {words}", hint="check the name and your login: hf auth whoami")
