"""The Hugging Face Hub: the only user of huggingface_hub, whose errors become ours here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvbuy.errors import ModelError, StoreError

MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt"]


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


def push_file(path: Path, repo: str) -> str:
    """Upload a file to a model repository, which is made where it is missing; returns the commit's address.

    Raises:
        StoreError: not logged in, no right to write there, or the Hub is out of reach.
    """
    from huggingface_hub import HfApi

    with _reaching(repo):
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        done = api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo)
    return str(done.commit_url)


def list_files(repo: str) -> list[str]:
    """The names of a model repository's files (StoreError where it cannot be reached)."""
    from huggingface_hub import HfApi

    with _reaching(repo):
        return HfApi().list_repo_files(repo)


def pull_file(repo: str, name: str) -> Path:
    """A file of a model repository, in the Hub's own cache (StoreError where it cannot be had)."""
    from huggingface_hub import hf_hub_download

    with _reaching(repo):
        return Path(hf_hub_download(repo, name))


@contextmanager
def _reaching(repo: str) -> Iterator[None]:
    """Turn what goes wrong between here and a repository into a StoreError."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise StoreError(f"{repo!r} is no Hub id", hint="name a repository as USER/NAME") from error
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError) as error:
        hint = "check the spelling; writing, and what is private or gated, needs: hf auth login"
        raise StoreError(f"{repo} is not on the Hub, or not for you", hint=hint) from error
    except errors.HfHubHTTPError as error:
        raise StoreError(f"the Hub refused: {str(error).splitlines()[0]}", hint="log in: hf auth login") from error
    except Exception as error:  # a broken line lets its HTTP library's errors through
        raise StoreError(f"{repo} cannot be reached: {error}", hint="check the connection, and try again") from error
