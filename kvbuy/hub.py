"""The Hugging Face Hub: the only user of huggingface_hub, whose errors become ours here."""

from pathlib import Path

from kvbuy.errors import ModelError

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
