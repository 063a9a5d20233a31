"""`kvbuy cost`: figures, prices and assumptions put together, each with its basis."""

import json
from pathlib import Path

import pytest
from conftest import Ran, Run
from figures import WEIGHTS, benchmark, row

from kvbuy.artifact import Artifact
from kvbuy.cost import Facts, Terms, estimate, find_subject
from kvbuy.errors import UsageError
from kvbuy.figures import Benchmark
from kvbuy.prices import shipped_prices
from kvbuy.render_cost import count, quantity, verdict

GIVEN = ("--tokens", "1000", "--bytes-per-token", "2e6", "--prefill-seconds", "360", "--reuse-seconds", "36")
BASES = {
    "measured",
    "listed",
    "given",
    "assumed",
    "unknown",
    "curves through the 2 lengths of the bench run, and the link",
}


@pytest.fixture
def bench_file(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(benchmark().model_dump_json())
    return path


def test_figures_come_from_the_bench_run_s_longest_document(run: Run, bench_file: Path) -> None:
    found = run("cost", "--bench", str(bench_file), "--gpu-usd-per-hour", "3600", "--json").json
    assert (found["tokens"], found["kv_bytes"]) == (2000, 2_020_000)
    assert found["per_load"]["prefill_usd"] == 10
    assert found["ratio"] == pytest.approx(40)
    assert found["break_even_loads"] == pytest.approx(40 / 39)
    assert found["break_even_gbps"] == pytest.approx(2_020_000 / 10 / 1e9)
    assert found["break_even_tokens"] > 0
    assert found["basis"]["prefill_seconds"] == "measured: tiny in BF16 on cpu, x86_64, 2 threads, 2026-11-24"


def test_a_length_between_two_measured_ones_lies_between_them() -> None:
    subject = find_subject(None, benchmark(), Facts(tokens=1500))
    assert subject.prefill_seconds.value == pytest.approx(7)
    assert subject.reuse_seconds.value == pytest.approx(0.225)
    assert subject.kv_bytes.value == pytest.approx(1_515_000)


@pytest.mark.parametrize("tokens", [999, 2001])
def test_a_length_beyond_the_measured_ones_is_refused(tokens: int) -> None:
    with pytest.raises(UsageError, match="covers 1000 to 2000 tokens") as error:
        find_subject(None, benchmark(), Facts(tokens=tokens))
    assert error.value.hint == f"kvbuy bench --lengths {tokens}"


def test_a_run_of_one_length_prices_that_length() -> None:
    one = benchmark(rows=[row(1000, prefill=4.0, load=0.1, first=0.1)])
    found = estimate(find_subject(None, one, Facts()), Terms(), shipped_prices())
    assert found.cases[0].tokens == 1000
    assert found.break_even_tokens is None
    assert found.basis["break_even_tokens"].startswith("unknown")


def test_an_artifact_of_another_model_than_the_run_is_refused(precomputed: Ran, run: Run, bench_file: Path) -> None:
    ran = run("cost", "doc.kv.safetensors", "--bench", str(bench_file))
    assert ran.code == 4
    assert "another model" in ran.err


def test_an_artifact_brings_its_own_length_and_size(precomputed: Ran, tmp_path: Path) -> None:
    artifact = Artifact.open(tmp_path / "doc.kv.safetensors")
    bench = benchmark(
        fingerprint=artifact.manifest.fingerprint.sha256(),
        rows=[row(100, prefill=1.0, load=0.1, first=0.1), row(300, prefill=3.0, load=0.1, first=0.1)],
    )
    subject = find_subject(artifact, bench, Facts())
    assert subject.tokens.value == artifact.manifest.document.tokens == 200
    assert subject.kv_bytes.value == artifact.path.stat().st_size
    assert subject.prefill_seconds.value == pytest.approx(2)


def test_every_figure_says_its_basis(run: Run, bench_file: Path) -> None:
    basis = run("cost", "--bench", str(bench_file), "--hours", "5", "--json").json["basis"]
    assert {text.partition(":")[0] for text in basis.values()} <= BASES
    assert basis["hours"] == "given: --hours"
    assert basis["publisher_share"].startswith("assumed")


def test_an_h100_s_price_for_a_cpu_s_time_is_pointed_out(run: Run, bench_file: Path) -> None:
    basis = run("cost", "--bench", str(bench_file), "--json").json["basis"]
    assert "a CPU was measured" in basis["gpu_usd_per_hour"]


def test_given_figures_need_no_run(run: Run) -> None:
    terms = ("--gpu-usd-per-hour", "10", "--usd-per-gb", "0.05", "--agents", "1", "--agents", "100", "--json")
    found = run("cost", *GIVEN, *terms, "--hours", "0").json
    assert [total["loads"] for total in found["totals"]] == [1, 100]
    assert [total["plan"] for total in found["totals"]] == ["prefill", "host"]
    assert found["totals"][1]["ship_usd"] == pytest.approx(1 + 100 * (0.1 + 0.1))
    assert found["seconds"]["transfer"] == pytest.approx(1.6)


def test_a_codec_has_the_size_that_was_measured(run: Run, bench_file: Path, tmp_path: Path) -> None:
    (tmp_path / "measure.json").write_text(json.dumps(WEIGHTS))
    found = run("cost", "--bench", str(bench_file), "--measure", "measure.json", "--codec", "fast", "--json").json
    assert found["kv_bytes"] == pytest.approx(0.66 * 2_000_000)
    assert found["basis"]["kv_bytes"] == "measured: fast on 2000 tokens of the model"
    assert "was not measured" in run("cost", *GIVEN[:2], "--measure", "measure.json", "--codec", "dense").err
    assert "nothing says what fast makes" in run("cost", *GIVEN, "--codec", "fast").err


def test_a_price_of_ones_own_replaces_the_table_s(run: Run, tmp_path: Path) -> None:
    own = {"name": "AWS", "usd_per_gb": 1.0, "date": "2026-12", "source": "our contract"}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "egress": [own]}))
    found = run("cost", *GIVEN, "--prices", "p.json", "--json").json
    assert found["per_load"]["egress_usd"] == 2
    assert found["basis"]["egress_usd_per_gb"] == "listed: AWS, 2026-12, our contract"


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ((), "which document"),
        (("--tokens", "10"), "how large"),
        (("--tokens", "10", "--bytes-per-token", "100"), "how long a prefill takes"),
        (GIVEN[:6], "how long a reuse takes"),
        ((*GIVEN, "--egress", "nobody"), "no price for 'nobody'"),
    ],
)
def test_what_is_missing_is_said_with_what_to_do(run: Run, arguments: tuple[str, ...], missing: str) -> None:
    ran = run("cost", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert missing in ran.err


def test_a_file_of_other_figures_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    ran = run("cost", "--bench", "other.json")
    assert ran.code == 2
    assert "does not hold what it should" in ran.err
    assert run("cost", "--bench", "none.json").code == 1


def test_the_tables_hold_every_way_and_the_verdict(run: Run, bench_file: Path) -> None:
    shown = run("cost", "--bench", str(bench_file)).out
    for words in (
        "prefill every time",
        "ship once, reuse there",
        "host at the provider",
        "users pay, cached",
        "Host: 1 M",
    ):
        assert words in shown


def verdict_of(bench: Benchmark, terms: Terms) -> str:
    return verdict(estimate(find_subject(None, bench, Facts()), terms, shipped_prices()).cases[-1])


def test_the_verdict_says_what_to_do_and_what_would_change_it() -> None:
    hosted = verdict_of(benchmark(), Terms(loads=(1000,), usd_per_hour=3600))
    assert hosted == (
        "Host: 1,000 loads cost $260.00 hosted, $10,000.00 prefilled, $260.18 shipped. "
        "Below 2 loads prefill is cheaper; no price of egress that anybody charges makes shipping so."
    )
    shipped = verdict_of(benchmark(), Terms(loads=(1000,), usd_per_hour=3600, usd_per_gb=0, keep="H100"))
    assert shipped.startswith("Ship: 1,000 loads cost $260.00 shipped, ")
    assert shipped.endswith(" a GB it is not.")
    once = verdict_of(benchmark(), Terms(loads=(1,), usd_per_hour=3600))
    assert once.startswith("Prefill: 1 load costs $10.00 prefilled, ")
    assert "From 2 loads on hosting is cheaper" in once


def test_reuse_that_is_slower_is_told_so() -> None:
    slow = benchmark(rows=[row(1000, prefill=0.1, load=0.1, first=0.1)])
    assert verdict_of(slow, Terms()).endswith("Reuse is not faster here, so no price changes that.")


def test_numbers_are_written_for_people() -> None:
    assert [count(n) for n in (1, 1500, 1e6, 2.5e6, 80e6)] == ["1", "1,500", "1 M", "2.5 M", "80 M"]
    assert [quantity(0.0486, "usd"), quantity(49.7, "x"), quantity(1.02, "")] == ["$0.0486", "49.7x", "1.02"]
