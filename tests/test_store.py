"""The store: nothing is lost, whatever happens, and equal blocks are kept once."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Ran, Run
from handmade import FULL, handmade
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvbuy.artifact import Artifact, write_artifact
from kvbuy.errors import DamagedError, ExistsError, KvbuyError, UsageError
from kvbuy.recode import convert
from kvbuy.store import Entry, Store, parse_share
from kvbuy.whole import TEMPORARY

LENGTHS = (16, 32, 40, 48)  # tokens: blocks of 16, all with equal beginnings


def make(folder: Path, tokens: int) -> Artifact:
    return write_artifact(folder / f"doc{tokens}.kv.safetensors", *handmade(range(tokens), layers=[FULL]))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return make(tmp_path, 40)


def objects(store: Store) -> list[Path]:
    return sorted(path for path in store.objects.iterdir() if not path.name.startswith(TEMPORARY))


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_what_is_put_comes_back_byte_for_byte(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    entry = store.put(artifact)
    found = store.get(store.find("doc40"), tmp_path / "again.kv.safetensors")
    assert found.path.read_bytes() == artifact.path.read_bytes()
    assert (entry.id, entry.bytes) == (artifact.id, artifact.path.stat().st_size)


@pytest.mark.parametrize("codec", ["raw", "fast"])
def test_equal_beginnings_are_kept_once(store: Store, tmp_path: Path, codec: str) -> None:
    short, long = make(tmp_path, 32), make(tmp_path, 48)
    if codec == "fast":
        short, long = convert(short, codec="fast").artifact, convert(long, codec="fast").artifact
    first, second = store.put(short), store.put(long)
    assert {piece.digest for piece in first.pieces[1:3]} == {piece.digest for piece in second.pieces[1:3]}
    assert len(objects(store)) == len({*first.pieces, *second.pieces}) == 5 + 6 - 2


def test_putting_again_changes_nothing(store: Store, artifact: Artifact) -> None:
    first = store.put(artifact)
    before = {path.name: path.stat().st_mtime_ns for path in objects(store)}
    assert store.put(artifact) == first
    assert {path.name: path.stat().st_mtime_ns for path in objects(store)} == before


def test_signatures_are_kept_with_an_artifact(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    beside = tmp_path / "doc40.kv.sig.json"
    beside.write_bytes(b"{}")
    store.put(artifact)
    beside.unlink()
    store.put(artifact)
    store.get(store.find("doc40"), tmp_path / "again.kv.safetensors")
    assert (tmp_path / "again.kv.sig.json").read_bytes() == b"{}"


def test_a_signature_of_what_was_there_before_goes(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    entry = store.put(artifact)
    (tmp_path / "again.kv.sig.json").write_bytes(b"{}")
    store.get(entry, tmp_path / "again.kv.safetensors")
    assert not (tmp_path / "again.kv.sig.json").exists()


def test_one_damaged_entry_does_not_stand_before_the_others(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    damaged, sound = store.put(artifact), store.put(make(tmp_path, 32))
    damage(store.entries_folder / f"{damaged.id}.json")
    assert store.entries() == (sound,)
    assert store.get(store.find("doc32"), tmp_path / "again.kv.safetensors").id == sound.id


def test_a_damaged_artifact_is_not_put(store: Store, artifact: Artifact) -> None:
    damage(artifact.path)
    with pytest.raises(DamagedError):
        store.put(artifact)
    assert store.entries() == ()


def test_a_damaged_object_is_never_given_out_and_is_mended_by_putting_again(
    store: Store, artifact: Artifact, tmp_path: Path
) -> None:
    entry = store.put(artifact)
    for path in objects(store):
        raw = path.read_bytes()
        damage(path)
        with pytest.raises(DamagedError, match="is damaged"):
            store.get(entry, tmp_path / "again.kv.safetensors")
        assert store.check().damaged == (path.name,)
        assert not (tmp_path / "again.kv.safetensors").exists()
        store.put(artifact)
        assert path.read_bytes() == raw
    assert store.check().sound


def test_every_flipped_bit_of_an_entry_is_seen(store: Store, artifact: Artifact) -> None:
    entry = store.put(artifact)
    path = store.entries_folder / f"{entry.id}.json"
    raw = path.read_bytes()
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        assert store.entries() == ()
    assert store.check().unreadable == (entry.id,)


def test_garbage_is_what_no_entry_needs(store: Store, tmp_path: Path) -> None:
    short, long = store.put(make(tmp_path, 32)), store.put(make(tmp_path, 48))
    store.remove(long.id)
    freed = store.collect()
    assert (freed.objects, freed.temporaries) == (4, 0)
    assert store.get(short, tmp_path / "again.kv.safetensors").id == short.id
    store.remove(short.id)
    store.collect()
    assert objects(store) == []


def test_what_a_crashed_writer_left_is_garbage_too(store: Store, artifact: Artifact) -> None:
    store.put(artifact)
    (store.objects / f"{TEMPORARY}0.tmp").write_bytes(b"half")
    assert (store.collect().temporaries, store.check().sound) == (1, True)


def test_nothing_is_collected_while_an_entry_cannot_be_read(store: Store, artifact: Artifact) -> None:
    entry = store.put(artifact)
    damage(store.entries_folder / f"{entry.id}.json")
    before = objects(store)
    with pytest.raises(DamagedError, match="cannot be read"):
        store.collect()
    assert objects(store) == before
    store.remove(store.find_id(entry.id[:8]))
    assert store.collect().objects == len(before)


def test_a_missing_object_is_named(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    entry = store.put(artifact)
    (store.objects / entry.pieces[1].digest).unlink()
    assert store.check().missing == (entry.pieces[1].digest,)
    with pytest.raises(DamagedError, match="cannot be read"):
        store.get(entry, tmp_path / "again.kv.safetensors")


def test_a_check_reads_a_sample_or_as_much_as_there_is_time_for(store: Store, artifact: Artifact) -> None:
    entry = store.put(artifact)
    assert store.check(sample=0.5).read == -(-len(entry.pieces) // 2)
    assert store.check(max_seconds=0.0).read <= 1
    assert store.check(sample=0).read == 0


def test_names_that_are_unclear_are_refused(store: Store, artifact: Artifact, tmp_path: Path) -> None:
    store.put(artifact)
    with pytest.raises(UsageError, match="0 artifacts"):
        store.find("other")
    store.put(make(tmp_path, 32))
    with pytest.raises(UsageError, match="2 artifacts"):
        store.find("")


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.5", 0.5), ("100%", 1.0)])
def test_a_sample_is_a_share(text: str, share: float) -> None:
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["x", "-1", "101%", "nan"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_share(text)


class Model(RuleBasedStateMachine):
    """The store beside a dict: whatever happens, what was put and not removed comes back, or its damage is told."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(os.environ["STORE_MACHINE"]) / os.urandom(6).hex()
        self.folder.mkdir()
        self.store = Store(self.folder / "store")
        self.kept: dict[int, Entry] = {}
        self.damaged: set[str] = set()

    @initialize()
    def documents(self) -> None:
        self.artifacts = {tokens: make(self.folder, tokens) for tokens in LENGTHS}

    @rule(tokens=st.sampled_from(LENGTHS))
    def put(self, tokens: int) -> None:
        self.kept[tokens] = self.store.put(self.artifacts[tokens])
        self.damaged -= {piece.digest for piece in self.kept[tokens].pieces}

    @rule(tokens=st.sampled_from(LENGTHS))
    def get(self, tokens: int) -> None:
        out = self.folder / "got.kv.safetensors"
        if tokens not in self.kept:
            with pytest.raises(UsageError):
                self.store.find(f"doc{tokens}")
            return
        entry = self.store.find(f"doc{tokens}")
        if self.damaged & {piece.digest for piece in entry.pieces}:
            with pytest.raises(DamagedError):
                self.store.get(entry, out, force=True)
            return
        self.store.get(entry, out, force=True)
        assert out.read_bytes() == self.artifacts[tokens].path.read_bytes()

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        tokens = data.draw(st.sampled_from(sorted(self.kept)))
        self.store.remove(self.kept.pop(tokens).id)

    @rule()
    def collect(self) -> None:
        self.store.collect()
        needed = {piece.digest for entry in self.kept.values() for piece in entry.pieces}
        assert {path.name for path in objects(self.store)} == needed
        self.damaged &= needed

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def corrupt(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(objects(self.store)))
        if path.name not in self.damaged:
            damage(path)
            self.damaged.add(path.name)

    @rule(tokens=st.sampled_from(LENGTHS), at=st.integers(1, 30))
    def crash(self, tokens: int, at: int) -> None:
        """A put that is cut off at its `at`th system call leaves what was there."""
        with faults(at) as counter, pytest.MonkeyPatch.context():
            try:
                self.kept[tokens] = self.store.put(self.artifacts[tokens])
            except KvbuyError:
                assert counter.fired
            else:
                self.damaged -= {piece.digest for piece in self.kept[tokens].pieces}
                return
        if tokens in self.kept:
            self.damaged = {name for name in self.damaged if not self.is_whole(name)}
        if any(entry.name == f"doc{tokens}.kv.safetensors" for entry in self.store.entries()):
            self.kept[tokens] = self.store.find(f"doc{tokens}")
        self.damaged = {name for name in self.damaged if not self.is_whole(name)}

    def is_whole(self, name: str) -> bool:
        from kvbuy.artifact import content_digest

        path = self.store.objects / name
        return path.exists() and content_digest([path.read_bytes()]) == name

    @rule()
    def reopen(self) -> None:
        self.store = Store(self.folder / "store")

    @invariant()
    def entries_are_what_was_kept(self) -> None:
        assert {entry.id for entry in self.store.entries()} == {entry.id for entry in self.kept.values()}
        found = self.store.check()
        needed = {piece.digest for entry in self.kept.values() for piece in entry.pieces}
        assert (set(found.damaged), found.missing) == (self.damaged & needed, ())

    def teardown(self) -> None:
        shutil.rmtree(self.folder)


class faults:
    """Let the n-th write, fsync, rename or open below the store fail with ENOSPC or EIO."""

    def __init__(self, at: int, *, code: int = 28) -> None:
        self.at, self.code, self.count, self.fired = at, code, 0, False
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> "faults":
        import kvbuy.whole as whole

        real = {"fsync": os.fsync, "replace": os.replace}
        for name, function in real.items():
            self.patch.setattr(whole.os, name, self.failing(function))
        opened = Path.open

        def open_failing(path: Path, *arguments: object, **options: object) -> object:
            mode = arguments[0] if arguments else options.get("mode", "r")
            if "x" not in str(mode):
                return opened(path, *arguments, **options)  # type: ignore[arg-type]
            self.step()
            file = opened(path, *arguments, **options)  # type: ignore[arg-type]
            return Failing(file, self)

        self.patch.setattr(Path, "open", open_failing)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def step(self) -> None:
        """Count a system call; the chosen one fails."""
        self.count += 1
        if self.count == self.at:
            self.fired = True
            raise OSError(self.code, os.strerror(self.code))

    def failing(self, function: object) -> object:
        def wrapped(*arguments: object, **options: object) -> object:
            self.step()
            return function(*arguments, **options)  # type: ignore[operator]

        return wrapped


class Failing:
    """A file whose writes count."""

    def __init__(self, file: object, faults: faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: bytes) -> int:
        self.faults.step()
        return self.file.write(data)  # type: ignore[attr-defined, no-any-return]

    def __enter__(self) -> "Failing":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


@pytest.fixture(scope="module")
def machine_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("machine")
    os.environ["STORE_MACHINE"] = str(folder)
    return folder


def test_the_store_behaves_as_its_model_whatever_happens(machine_folder: Path) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    wanted = settings(
        max_examples=25,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(Model, settings=wanted)


@pytest.mark.parametrize("code", [28, 5], ids=["ENOSPC", "EIO"])
def test_a_put_that_fails_anywhere_leaves_the_old_state_or_the_new_one(tmp_path: Path, code: int) -> None:
    old, new = make(tmp_path, 32), make(tmp_path, 48)
    outcomes = []
    for at in range(1, 1000):
        store = Store(tmp_path / f"store{at}")
        kept = store.put(old)
        with faults(at, code=code) as counter:
            try:
                store.put(new)
            except KvbuyError:
                outcomes.append("refused")
        assert store.check().sound
        ids = {entry.id for entry in store.entries()}
        assert ids in ({kept.id}, {kept.id, new.id})
        for entry in store.entries():
            store.get(entry, tmp_path / "got.kv.safetensors", force=True)
        assert not list(store.objects.glob(f"{TEMPORARY}*"))
        if not counter.fired:
            break
    assert len(outcomes) == at - 1 > 20  # every call that can fail did, and each was told


def test_a_get_that_fails_anywhere_leaves_no_file_or_the_whole_one(
    store: Store, artifact: Artifact, tmp_path: Path
) -> None:
    entry, raw = store.put(artifact), artifact.path.read_bytes()
    for at in range(1, 100):
        out = tmp_path / f"got{at}.kv.safetensors"
        with faults(at) as counter, suppress(KvbuyError):
            store.get(entry, out)
        assert not out.exists() or out.read_bytes() == raw
        assert not list(tmp_path.glob(f"{TEMPORARY}*"))
        if not counter.fired:
            break
    assert at > 8
    assert out.exists()


KILLED = """
import os, sys
from pathlib import Path
import kvbuy.whole
from kvbuy.artifact import Artifact
from kvbuy.store import Store

at, count = int(sys.argv[1]), 0

def step():
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), 9)

def dying(function):
    def wrapped(*arguments, **options):
        step()
        return function(*arguments, **options)
    return wrapped

class Dying:
    def __init__(self, file):
        self.file = file
    def write(self, data):
        half = len(data) // 2
        self.file.write(data[:half])
        self.file.flush()
        step()
        return half + self.file.write(data[half:])
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def __getattr__(self, name):
        return getattr(self.file, name)

opened = Path.open
def open_dying(path, mode="r", *rest, **options):
    if "x" not in mode:
        return opened(path, mode, *rest, **options)
    step()
    return Dying(opened(path, mode, *rest, **options))

Path.open = open_dying
kvbuy.whole.os.fsync, kvbuy.whole.os.replace = dying(os.fsync), dying(os.replace)
Store(Path(sys.argv[2])).put(Artifact.open(Path(sys.argv[3])))
print(count)
"""


def test_a_process_killed_anywhere_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    old, new = make(tmp_path, 16), make(tmp_path, 32)

    def put(at: int, folder: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", KILLED, str(at), str(folder), str(new.path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    clean = put(0, tmp_path / "clean")
    assert clean.returncode == 0, clean.stderr
    calls = int(clean.stdout)
    killed = 0
    for at in range(1, calls + 1):
        store = Store(tmp_path / f"store{at}")
        kept = store.put(old)
        killed += put(at, store.folder).returncode == -9
        assert store.check().sound
        assert {entry.id for entry in store.entries()} in ({kept.id}, {kept.id, new.id})
        store.collect()
        assert not list(store.objects.glob(f"{TEMPORARY}*"))
        entry = store.put(new)
        assert store.get(entry, tmp_path / "got.kv.safetensors", force=True).id == new.id
    assert killed >= 5


RACING = """
import sys
from pathlib import Path
from kvbuy.artifact import Artifact
from kvbuy.errors import KvbuyError
from kvbuy.store import Store

store, number = Store(Path(sys.argv[1])), int(sys.argv[2])
artifacts = [Artifact.open(Path(name)) for name in sys.argv[3:]]
out = Path(sys.argv[1]).parent / f"got{number}.kv.safetensors"
for at in range(8):
    artifact = artifacts[(at + number) % len(artifacts)]
    entry = store.put(artifact)
    if (at + number) % 3 == 0:
        store.collect()
    store.get(entry, out, force=True)
    assert out.read_bytes() == artifact.path.read_bytes()
    assert store.check().sound
"""


def test_eight_processes_write_and_read_at_once(tmp_path: Path) -> None:
    names = [str(make(tmp_path, tokens).path) for tokens in LENGTHS]
    arguments = [str(tmp_path / "store")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RACING, *arguments, str(number), *names], stderr=subprocess.PIPE, text=True
        )
        for number in range(8)
    ]
    for process in running:
        _, words = process.communicate(timeout=300)
        assert process.returncode == 0, words
    store = Store(tmp_path / "store")
    assert len(store.entries()) == len(LENGTHS)
    assert store.check().sound


def test_the_verbs_keep_show_check_and_free(
    run: Run, precomputed: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBUY_STORE", str(tmp_path / "kept"))
    assert run("store", "put", "doc.kv.safetensors").code == 0
    [shown] = run("store", "ls", "--json").json["artifacts"]
    assert (shown["name"], shown["shared_bytes"]) == ("doc.kv.safetensors", 0)
    assert run("store", "get", "doc").code == 1
    assert run("store", "get", "doc", "--out", "nowhere").code == 2
    (tmp_path / "into").mkdir()
    assert run("store", "get", "doc", "--out", "into").out.strip() == "into/doc.kv.safetensors"
    assert run("store", "get", "doc", "--out", "again.kv.safetensors", "--json").json["id"] == shown["id"]
    checked = run("store", "check", "--sample", "50%", "--json").json
    assert (checked["sound"], checked["entries"]) == (True, 1)
    assert run("store", "rm", shown["id"][:8]).code == 0
    assert run("store", "gc", "--json").json["objects"] == shown["pieces"]
    assert run("store", "ls", "--json").json["artifacts"] == []


def test_an_existing_file_is_not_replaced(store: Store, artifact: Artifact) -> None:
    entry = store.put(artifact)
    with pytest.raises(ExistsError):
        store.get(entry, artifact.path)
