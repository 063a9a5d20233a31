"""Identity: what a model is, read from the bytes of its folder, and how two models or machines differ.

Torch-free: the config is read as JSON, weights as bytes. A folder's large files are hashed once and remembered by path,
size and modification time; in the Hub's cache a large file's blob is already named by its SHA-256.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvbuy.errors import ModelError
from kvbuy.manifest import Fingerprint, FloatType, Profile
from kvbuy.places import cache_folder

# Labels inside config.json: they change when a folder is saved or renamed, and change no value.
CONFIG_LABELS = {"_name_or_path", "_model_name_or_path", "transformers_version", "_commit_hash", "dtype", "torch_dtype"}
TOKENIZER_LABELS = {"name_or_path", "chat_template", "local_files_only", "is_local"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SHA256_NAME = re.compile(r"^[0-9a-f]{64}$")


def model_fingerprint(folder: Path, *, dtype: FloatType, adapters: Sequence[Path] = ()) -> Fingerprint:
    """The fingerprint of a model folder when it runs in `dtype`, with PEFT adapter folders applied.

    Raises:
        ModelError: the folder holds no model, or its weights are not safetensors.
    """
    config = read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"the model folder {folder.name!r} holds an adapter too, which transformers would apply silently",
            hint="move it to a folder of its own and give that to --adapter",
        )
    quantization = config.pop("quantization_config", None)
    return Fingerprint(
        weights=_value_digest(
            {path.relative_to(folder).as_posix(): file_sha256(path) for path in _weight_files(folder)}
        ),
        config=_value_digest({key: value for key, value in config.items() if key not in CONFIG_LABELS}),
        tokenizer=_tokenizer_digest(folder),
        chat_template=_template_digest(folder),
        dtype=dtype,
        quantization=_value_digest(quantization) if quantization else None,
        adapters=tuple(_adapter_digest(adapter) for adapter in adapters),
    )


def fingerprint_differences(wanted: Fingerprint, found: Fingerprint) -> tuple[str, ...]:
    """The parts in which two fingerprints differ, a sentence each; empty where they are equal."""
    return _differences(wanted.model_dump(), found.model_dump())


def profile_differences(wanted: Profile, found: Profile) -> tuple[str, ...]:
    """The parts in which two profiles differ, a sentence each; empty where they are equal."""
    return _differences(wanted.model_dump(), found.model_dump())


def file_sha256(path: Path) -> str:
    """The hex SHA-256 of a file: from its name in the Hub's cache, from memory, or hashed now.

    Raises:
        ModelError: the file cannot be read.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and SHA256_NAME.match(real.name):
        return real.name
    memory = cache_folder() / "hashes.json"
    try:
        status = real.stat()
        key = f"{real}|{status.st_size}|{status.st_mtime_ns}"
        known = _remembered(memory)
        if key not in known:
            with real.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
            with suppress(OSError):  # a memory that cannot be written costs one hashing
                _remember(memory, known)
    except OSError as error:
        raise ModelError(f"cannot read {path.name} of the model: {error.strerror}") from error
    return known[key]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        ModelError: it is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent.name!r} is not a model folder: it has no {path.name}",
            hint="give --model a folder saved with save_pretrained, or a Hub id",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path.name} of the model {path.parent.name!r}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} of the model {path.parent.name!r} is no JSON object")
    return value


def _weight_files(folder: Path) -> list[Path]:
    if (folder / "model.safetensors").exists():  # transformers looks for it first, and so it is what runs
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ModelError(f"{index.name} of the model {folder.name!r} holds no weight_map")
        return sorted({folder / str(name) for name in names.values()})
    raise ModelError(
        f"the model {folder.name!r} has no safetensors weights",
        hint="convert it once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)",
    )


def _tokenizer_digest(folder: Path) -> str:
    parts: dict[str, Any] = {name: file_sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).exists()}
    if not parts:
        raise ModelError(f"the model {folder.name!r} has no tokenizer", hint="save its tokenizer into the same folder")
    for name in TOKENIZER_SETTINGS:
        if (folder / name).exists():
            settings = read_json(folder / name)
            parts[name] = {key: value for key, value in settings.items() if key not in TOKENIZER_LABELS}
    return _value_digest(parts)


def _template_digest(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    settings = folder / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.exists() else None
    return _value_digest(template) if template else None


def _adapter_digest(folder: Path) -> str:
    settings = read_json(folder / "adapter_config.json")
    settings = {key: value for key, value in settings.items() if key != "base_model_name_or_path"}
    weights = folder / "adapter_model.safetensors"
    if not weights.exists():
        raise ModelError(f"the adapter {folder.name!r} has no adapter_model.safetensors")
    return _value_digest({"config": _value_digest(settings), "weights": file_sha256(weights)})


def _value_digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))  # not canonical JSON: configs hold floats, even inf
    return hashlib.sha256(text.encode()).hexdigest()


def _differences(wanted: Mapping[str, object], found: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(
        f"{key.replace('_', ' ')}: artifact {_short(value)}, here {_short(found[key])}"
        for key, value in wanted.items()
        if value != found[key]
    )


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if not text or value is None:
        return "none"
    return f"{text[:12]}..." if SHA256_NAME.match(text) else text


def _remembered(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a lost memory costs one hashing
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, known: dict[str, str]) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    temporary = memory.with_name(f"{memory.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_text(json.dumps(known, indent=0), encoding="utf-8")
    os.replace(temporary, memory)
