"""Headers and manifests made of grammar and chance: refused in our words, in little time and memory, or honest."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from handmade import FULL, facts_of, handmade
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbuy.artifact import Artifact, write_artifact
from kvbuy.errors import DamagedError
from kvbuy.manifest import canonical_json, parse_manifest
from kvbuy.reader import check_contents

MANIFEST, BUFFERS = handmade(layers=[FULL])
FACTS = facts_of(MANIFEST)
MOST_MEMORY = 30_000_000

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["raw", "full", "../x", "BF16", "0" * 64, 2**47, 10**9, 16]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
)


def paths(facts: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    items = facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ()
    return [before] + [path for key, value in items for path in paths(value, (*before, key))]


PATHS = [path for path in paths(FACTS) if path]


def put(facts: Any, path: tuple[Any, ...], value: object) -> Any:
    copy = json.loads(json.dumps(facts))
    target = copy
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    return copy


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("fuzz") / "doc.kv.safetensors", MANIFEST, BUFFERS).path


def look(path: Path) -> str:
    """The id of an artifact that is accepted; refusals are DamagedErrors in words that can be shown."""
    tracemalloc.start()
    try:
        artifact = Artifact.open(path)
        check_contents(artifact)
        return artifact.id
    except DamagedError as error:
        return "refused" if error.message.isprintable() else error.message
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MOST_MEMORY


anywhere = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@anywhere
@given(path=st.sampled_from(PATHS), value=values)
def test_a_manifest_with_any_value_anywhere_is_refused_or_parses_to_itself(
    path: tuple[Any, ...], value: object
) -> None:
    try:
        raw = canonical_json(put(FACTS, path, value))
        manifest = parse_manifest(raw)
    except (DamagedError, ValueError, UnicodeEncodeError):
        return
    assert manifest.canonical() == raw


@anywhere
@given(path=st.sampled_from(PATHS), value=values)
def test_a_file_whose_header_follows_from_such_a_manifest_is_refused(
    file: Path, path: tuple[Any, ...], value: object
) -> None:
    """Labels may say anything: with them alone changed, the file is another honest one."""
    try:
        manifest = parse_manifest(canonical_json(put(FACTS, path, value)))
        header = manifest.header() if manifest.count_tensors() < 10_000 else b""
    except (DamagedError, ValueError):
        return
    other = file.with_name("other.kv.safetensors")
    other.write_bytes(header + b"".join(BUFFERS))
    assert look(other) in ("refused", manifest.sha256())


@anywhere
@given(at=st.integers(0, 3000), cut=st.integers(0, 40), chance=st.binary(max_size=40))
def test_a_file_with_some_bytes_exchanged_is_refused(file: Path, at: int, cut: int, chance: bytes) -> None:
    raw = file.read_bytes()
    other = file.with_name("other.kv.safetensors")
    changed = raw[:at] + chance + raw[at + cut :]
    other.write_bytes(changed)
    assert look(other) == (MANIFEST.sha256() if changed == raw else "refused")


@anywhere
@given(chance=st.binary(max_size=300), length=st.integers(0, 2**64 - 1))
def test_bytes_of_chance_are_refused(file: Path, chance: bytes, length: int) -> None:
    other = file.with_name("other.kv.safetensors")
    for raw in (chance, length.to_bytes(8, "little") + chance, len(chance).to_bytes(8, "little") + chance):
        other.write_bytes(raw)
        assert look(other) == "refused"
