"""`kvbuy cost`: figures, prices and assumptions put together, each with its basis."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, Run
from figures import FINGERPRINT, WEIGHTS, benchmark, row

from kvbuy.artifact import Artifact
from kvbuy.cost import Terms, estimate
from kvbuy.errors import UsageError
from kvbuy.figures import Benchmark, Weights
from kvbuy.prices import read_prices, shipped_prices
from kvbuy.render_cost import cost_notes, count, quantity, verdict
from kvbuy.subject import Facts, find_subject

GIVEN = ("--tokens", "1000", "--bytes-per-token", "2e6", "--prefill-seconds", "360", "--reuse-seconds", "36")
BASES = {"measured", "listed", "given", "assumed", "computed"}


@pytest.fixture
def bench_file(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(benchmark().model_dump_json())
    return path


def test_figures_come_from_the_bench_run_s_longest_document(run: Run, bench_file: Path) -> None:
    found = run("cost", "--bench", str(bench_file), "--gpu-usd-per-hour", "3600", "--json").json
    value = values(found)
    assert (value["tokens"], value["kv_bytes"]) == (2000, 2_020_000)
    assert found["one"]["prefill_usd"] == 10
    assert value["ratio"] == pytest.approx(40)
    assert value["break_even_loads"] == pytest.approx(40 / 39)
    assert value["break_even_gbps"] == pytest.approx(2_020_000 / 10 / 1e9)
    assert value["break_even_tokens"] > 0
    basis = found["inputs"]["prefill_seconds"]["basis"]
    assert basis == "measured: tiny in BF16 on cpu, x86_64, 2 threads, 2026-11-24"


def test_a_length_between_two_measured_ones_lies_between_them() -> None:
    subject = find_subject(None, benchmark(), Facts(tokens=1500))
    assert subject.prefill_seconds.value == pytest.approx(7)
    assert subject.reuse_seconds.value == pytest.approx(0.225)
    assert subject.kv_bytes.value == pytest.approx(1_515_000)
    assert subject.kv_bytes.basis.endswith("codec raw, interpolated between 1000 and 2000 tokens")


def test_prefill_is_the_faster_of_blocks_and_single_pass() -> None:
    fast = benchmark(rows=[row(1000, prefill=4.0, load=0.1, first=0.1, single_pass_seconds=3.0, ratio=15.0)])
    assert find_subject(None, fast, Facts()).prefill_seconds.value == 3


@pytest.mark.parametrize("tokens", [999, 2001])
def test_a_length_beyond_the_measured_ones_is_refused(tokens: int) -> None:
    with pytest.raises(UsageError, match="covers 1000 to 2000 tokens") as error:
        find_subject(None, benchmark(), Facts(tokens=tokens))
    wanted = ",".join(map(str, sorted((1000, 2000, tokens))))
    assert f"--lengths {wanted} --out FILE" in (error.value.hint or "")


def test_a_run_of_one_length_prices_that_length() -> None:
    one = benchmark(rows=[row(1000, prefill=4.0, load=0.1, first=0.1)])
    found = estimate(find_subject(None, one, Facts()), Terms(), shipped_prices())
    assert found.cases[0].tokens == 1000
    assert math.isnan(found.computed["break_even_tokens"].value)
    assert found.computed["break_even_tokens"].basis.startswith("unknown")


def test_a_length_that_no_link_reaches_is_told_so() -> None:
    linear = benchmark(rows=[row(n, prefill=n / 250, load=0.1, first=0.1) for n in (1000, 2000)])
    found = estimate(find_subject(None, linear, Facts()), Terms(link_gbit=1e-6), shipped_prices())
    assert "Fetched over the link, reuse is slower than prefill at every length." in cost_notes(found)


def test_an_artifact_of_another_model_than_the_run_is_refused(precomputed: Ran, run: Run, bench_file: Path) -> None:
    ran = run("cost", "doc.kv.safetensors", "--bench", str(bench_file))
    assert ran.code == 4
    assert "not of one model" in ran.err
    assert f"fingerprint {FINGERPRINT[:12]}..." in ran.err


def test_weights_of_another_model_than_the_run_are_refused(run: Run, bench_file: Path, tmp_path: Path) -> None:
    (tmp_path / "measure.json").write_text(json.dumps(WEIGHTS | {"fingerprint": "1" * 64}))
    ran = run("cost", "--bench", str(bench_file), "--measure", "measure.json", "--codec", "fast")
    assert ran.code == 4
    assert "the measurement is of tiny, fingerprint 111111111111..." in ran.err


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
    found = run("cost", "--bench", str(bench_file), "--hours", "5", "--json").json
    figures = found["inputs"] | found["computed"]
    assert {figure["basis"].partition(":")[0] for figure in figures.values()} == BASES
    assert figures["hours"] == {"value": 5.0, "basis": "given: --hours"}
    assert figures["publisher_share"]["basis"].startswith("assumed")
    assert all(tier["basis"].startswith("listed: ") for tier in found["tiers"])
    shown = run("cost", "--bench", str(bench_file), "--hours", "5").out
    assert "hours 5, given: --hours" in shown


def test_an_h100_s_price_for_another_machine_s_time_is_pointed_out(run: Run, bench_file: Path) -> None:
    hour, tariff = run("cost", "--bench", str(bench_file), "--json").json["caveats"]
    assert hour.startswith("An hour is priced as that of H100, but it was measured on cpu, x86_64, 2 threads")
    assert tariff.startswith("Users are taken to pay as for Claude Opus 5.5")
    given = ("--gpu-usd-per-hour", "1", "--tariff", "gpt-6.1 sol", "--json")
    assert run("cost", "--bench", str(bench_file), *given).json["caveats"] == []
    h100 = benchmark(machine="cuda, NVIDIA H100 80GB HBM3, 8 threads")
    assert len(estimate(find_subject(None, h100, Facts()), Terms(), shipped_prices()).caveats) == 1


def test_a_machine_of_which_nothing_is_said_is_priced_aloud(run: Run) -> None:
    assert "taken to cost as an H100" in run("cost", *GIVEN).out
    assert "taken to cost" not in run("cost", *GIVEN, "--gpu", "H100").out


def test_a_price_of_ones_own_is_taken_for_the_machine_s(tmp_path: Path) -> None:
    own = {"name": "ours", "usd_per_hour": 0.1, "memory_gb": 24, "date": "2026-12", "source": "our contract"}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "gpus": [own]}))
    found = estimate(find_subject(None, benchmark(), Facts()), Terms(), read_prices(tmp_path / "p.json"))
    assert [caveat.split()[0] for caveat in found.caveats] == ["Users"]


def test_a_route_ships_from_its_own_store_and_hosting_is_beside_it() -> None:
    for route, month in (("AWS", 0.023), ("GCP premium", 0.02), ("Hugging Face", 0.012)):
        found = estimate(find_subject(None, benchmark(), Facts()), Terms(egress=route), shipped_prices())
        hourly = pytest.approx(month * 12 / 8766)
        assert found.inputs["store_usd_per_gb_hour"].value == hourly
        assert found.inputs["usd_per_gb_hour"].value == hourly


def test_free_egress_costs_what_hosting_costs() -> None:
    same = verdict_of(benchmark(), Terms(loads=(1000,), usd_per_hour=3600, egress="Hugging Face"))
    assert "shipping from that store costs the same" in same


def test_a_codec_s_decoding_moves_the_length_from_which_reuse_pays() -> None:
    weights = Weights.model_validate(WEIGHTS)
    raw = estimate(find_subject(None, benchmark(), Facts()), Terms(), shipped_prices()).computed["break_even_tokens"]
    coded = find_subject(None, benchmark(), Facts(codec="fast", weights=weights))
    slow = estimate(coded, Terms(), shipped_prices()).computed["break_even_tokens"]
    assert slow.value > raw.value
    assert raw.basis.endswith("extrapolated below 1000 tokens")


def test_given_times_say_nothing_of_other_lengths() -> None:
    subject = find_subject(None, benchmark(), Facts(prefill_seconds=0.001))
    assert math.isnan(estimate(subject, Terms(), shipped_prices()).computed["break_even_tokens"].value)


def test_given_figures_need_no_run(run: Run) -> None:
    terms = ("--gpu-usd-per-hour", "10", "--usd-per-gb", "0.05", "--agents", "1", "--agents", "100", "--json")
    found = run("cost", *GIVEN, *terms, "--hours", "0").json
    assert [total["loads"] for total in found["totals"]] == [1, 100]
    assert [total["cheapest"] for total in found["totals"]] == ["prefill", "host"]
    ship = 1 + 100 * (0.1 + 0.1 + 0.4e-6)
    assert found["totals"][1]["usd"]["ship"] == pytest.approx(ship)
    assert found["totals"][1]["usd_per_load"]["ship"] == pytest.approx(ship / 100)
    assert values(found)["transfer_seconds"] == pytest.approx(1.6)


def test_a_codec_has_the_size_and_the_speed_that_were_measured(run: Run, bench_file: Path, tmp_path: Path) -> None:
    (tmp_path / "measure.json").write_text(json.dumps(WEIGHTS))
    options = ("--bench", str(bench_file), "--measure", "measure.json", "--codec", "fast", "--json")
    inputs = run("cost", *options).json["inputs"]
    assert inputs["kv_bytes"] == {"value": pytest.approx(0.66 * 2_000_000), "basis": "measured: fast"}
    assert inputs["reuse_seconds"]["value"] == pytest.approx(0.25 + 2_000_000 / 2e9)
    assert inputs["reuse_seconds"]["basis"].endswith("and fast decoded on one core, 2 GB/s")
    scaled = run("cost", *options, "--tokens", "1000").json["inputs"]["kv_bytes"]["basis"]
    assert scaled == "measured: fast, scaled from 2000 tokens"
    assert "was not measured" in run("cost", *GIVEN[:2], "--measure", "measure.json", "--codec", "dense").err
    given = (*GIVEN[:2], *GIVEN[4:])
    assert "nothing says what fast makes" in run("cost", *given, "--codec", "fast").err


def test_a_run_of_one_codec_does_not_time_another(run: Run, bench_file: Path, tmp_path: Path) -> None:
    bench_file.write_text(benchmark(codec="fast").model_dump_json())
    (tmp_path / "measure.json").write_text(json.dumps(WEIGHTS))
    ran = run("cost", "--bench", str(bench_file), "--measure", "measure.json", "--codec", "raw")
    assert (ran.code, "timed fast, not raw" in ran.err) == (2, True)
    assert "kvbuy bench --codec raw" in ran.err


def test_any_tier_can_keep_the_kv(run: Run) -> None:
    """An API charges an hour of a million tokens, a store a gigabyte."""
    found = run("cost", *GIVEN, "--keep", "Gemini 3.1 Pro", "--hours", "2", "--json").json
    assert values(found)["usd_per_gb_hour"] * 2 == pytest.approx(4.5 * 1000 / 1e6)


def test_a_price_of_ones_own_replaces_the_table_s(run: Run, tmp_path: Path) -> None:
    own = {"name": "AWS", "usd_per_gb": 1.0, "date": "2026-12", "source": "our contract"}
    (tmp_path / "p.json").write_text(json.dumps({"version": 1, "egress": [own]}))
    found = run("cost", *GIVEN, "--prices", "p.json", "--json").json
    assert found["one"]["egress_usd"] == pytest.approx(2, rel=1e-6)
    assert found["inputs"]["usd_per_gb"]["basis"] == "listed: AWS, 2026-12, our contract"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "H100", "--gpu-usd-per-hour", "3"), "two prices for one thing"),
        (("--egress", "AWS", "--usd-per-gb", "0.1"), "two prices for one thing"),
        (("--codec", "fast"), "two sizes for one thing"),
        (("--agents", "2.5"), "part of a load"),
        (("--agents", "nan"), "less than"),
        (("--usd-per-gb", "nan"), "less than"),
        (("--reuse-seconds", "nan"), "less than"),
        (("--hours", "inf"), "less than"),
        (("--gpu-usd-per-hour", "1e300"), "less than"),
        (("--paper",), "takes no tokens"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(run: Run, options: tuple[str, ...], words: str) -> None:
    ran = run("cost", *GIVEN, *options)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda facts: facts["rows"].reverse(), "not in the order"),
        (lambda facts: facts["rows"][0].update(prefill_seconds=0), "rows.0.prefill_seconds"),
        (lambda facts: facts["rows"][0].update(ratio=1000), "not that of the times"),
        (lambda facts: facts["rows"][0].update(prefill_flops={"linear": 0, "attention": 0}), "prefill_flops.linear"),
        (lambda facts: facts["rows"][0].update(tokens=10**400), "rows.0.tokens"),
        (lambda facts: (facts.clear(), facts.update(error="no model")), "it holds an error: no model"),
        (lambda facts: (facts.clear(), facts.update(WEIGHTS)), "give it as --measure"),
    ],
)
def test_a_file_of_odd_figures_is_refused(
    run: Run, bench_file: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    facts = json.loads(bench_file.read_text())
    change(facts)
    bench_file.write_text(json.dumps(facts))
    ran = run("cost", "--bench", str(bench_file))
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


def test_a_bench_file_is_not_taken_for_a_measurement(run: Run, bench_file: Path) -> None:
    assert "give it as --bench" in run("cost", *GIVEN, "--measure", str(bench_file)).err


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


def values(found: dict[str, Any]) -> dict[str, Any]:
    """The values of all figures by name."""
    return {name: figure["value"] for name, figure in (found["inputs"] | found["computed"]).items()}


def verdict_of(bench: Benchmark, terms: Terms) -> str:
    return verdict(estimate(find_subject(None, bench, Facts()), terms, shipped_prices()).cases[-1])


def test_the_verdict_says_what_to_do_and_what_would_change_it() -> None:
    hosted = verdict_of(benchmark(), Terms(loads=(1000,), usd_per_hour=3600))
    assert hosted == (
        "Host: 1,000 loads cost $260.00 hosted, $10,000.00 prefilled, $260.18 shipped. "
        "Below 2 loads prefill is cheaper; only where egress is free does shipping cost as little."
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
    free = verdict_of(benchmark(), Terms(usd_per_hour=0))
    assert free.endswith("Prefill costs no more than a load here, so nothing is cheaper.")


def test_loads_at_one_place_are_shipped_once() -> None:
    once = verdict_of(benchmark(), Terms(loads=(1000,), usd_per_hour=3600, usd_per_gb=1e4, keep="H100", hours=1e6))
    assert once.endswith("below $31.22 a GB shipping is. All at one place: $280.26, shipped once.")


def test_numbers_are_written_for_people() -> None:
    assert [count(n) for n in (1, 1500, 1e6, 2.5e6, 80e6)] == ["1", "1,500", "1 M", "2.5 M", "80 M"]
    assert [quantity(0.0486, "usd"), quantity(49.7, "x"), quantity(1.02, "")] == ["$0.0486", "49.7x", "1.02"]
