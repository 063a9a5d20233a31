"""The command line through `main`: what stands on stdout, what on stderr, and the exit codes."""

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran, Run


def test_precompute_prints_its_artifacts(precomputed: Ran) -> None:
    (one,) = precomputed.json["artifacts"]
    assert one["artifact"] == "doc.kv.safetensors"
    assert (one["tokens"], one["blocks"], one["kv_bytes"]) == (200, 4, 51200)
    assert one["bytes"] == Path("doc.kv.safetensors").stat().st_size
    assert len(one["id"]) == 64
    assert one["prefill_seconds"] > 0


def test_precompute_takes_many_documents_and_a_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("Other text.")
    ran = run("precompute", "doc.txt", "other.md", "--model", "model", "--out", "out")
    assert ran.code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["doc.kv.safetensors", "other.kv.safetensors"]
    assert "other.kv.safetensors" in ran.out


def test_precompute_finds_the_model_by_environment(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUY_MODEL", "model")
    assert run("precompute", "doc.txt").code == 0


def test_aligned_reuse_of_one_block_is_said_to_save_nothing(run: Run, tmp_path: Path) -> None:
    run("precompute", "doc.txt", "--model", "model")
    ran = run("generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "2", "--reuse", "align")
    assert "aligned reuse saves little or nothing" in ran.err


def test_an_artifact_is_no_document(run: Run, precomputed: Ran) -> None:
    ran = run("precompute", "doc.kv.safetensors", "--out", "again")
    assert ran.code == 1
    assert "doc.kv.safetensors is an artifact already" in ran.err


def test_a_text_file_is_no_artifact(run: Run) -> None:
    ran = run("generate", "--kv", "doc.txt", "--prompt", "x")
    assert (ran.code, ran.out) == (3, "")
    assert "error: doc.txt: this is not a safetensors file" in ran.err
    assert "hint: " in ran.err


def test_the_version_is_shown(run: Run) -> None:
    import kvbuy

    assert run("--version").out == f"kvbuy {kvbuy.__version__}\n"


def test_an_existing_artifact_is_refused_before_anything_is_loaded(run: Run, precomputed: Ran) -> None:
    before = Path("doc.kv.safetensors").read_bytes()
    ran = run("precompute", "doc.txt", "--model", "no/such-model")
    assert (ran.code, ran.out) == (1, "")
    assert "doc.kv.safetensors is there already" in ran.err
    assert "--force" in ran.err
    assert Path("doc.kv.safetensors").read_bytes() == before


def test_one_bad_document_of_many_is_refused_before_the_first_is_computed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    ran = run("precompute", "doc.txt", "empty.txt", "--model", "model")
    assert ran.code == 1
    assert list(tmp_path.glob("*.kv.safetensors")) == []


@pytest.mark.parametrize(
    "args",
    [
        ["precompute"],
        ["precompute", "doc.txt", "--block-size", "17"],
        ["precompute", "doc.txt", "--out", "missing.txt"],
        ["precompute", "doc.txt", "--codec", "int8"],
        ["convert", "--out", "small"],
        ["generate"],
        ["generate", "--prompt", "x", "--reuse", "sometimes"],
        ["generate", "--prompt", "x", "--max-new-tokens", "0"],
        ["no-such-verb"],
    ],
    ids=" ".join,
)
def test_a_request_that_makes_no_sense_exits_2(run: Run, args: list[str]) -> None:
    ran = run(*args)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err


def test_generate_prints_the_answer_and_a_last_line(run: Run, precomputed: Ran) -> None:
    args = ["--model", "model", "--prompt", "What then?", "--max-new-tokens", "8"]
    ran = run("generate", "--kv", "doc.kv.safetensors", *args)
    answer = run("generate", "--kv", "doc.kv.safetensors", *args, "--json").json
    assert ran.code == 0
    assert ran.out == answer["text"] + "\n"
    last = ran.err.splitlines()[-1]
    assert last.startswith("200 cached tokens, 10 computed; load ")
    assert set(answer) >= {
        "text",
        "token_ids",
        "cached_tokens",
        "computed_tokens",
        "load_seconds",
        "first_token_seconds",
        "decode_tokens_per_second",
    }


def test_generate_takes_the_newest_artifact(run: Run, precomputed: Ran) -> None:
    ran = run("generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "2", "--json")
    assert ran.json["cached_tokens"] == 200
    assert ran.err == ""
    said = run("generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "2").err
    assert said.startswith("artifact: doc.kv.safetensors\n")


def test_several_prompts_are_answered_from_one_load(run: Run, precomputed: Ran) -> None:
    args = ["generate", "--model", "model", "--max-new-tokens", "4", "--json"]
    answers = run(*args, "-p", "One?", "-p", "Two?").json["answers"]
    alone = [run(*args, "-p", prompt).json for prompt in ("One?", "Two?")]
    assert [answer["token_ids"] for answer in answers] == [answer["token_ids"] for answer in alone]


def test_a_prompt_is_read_from_stdin(run: Run, precomputed: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What then?\n")))
    args = ["generate", "--model", "model", "--max-new-tokens", "2", "--json"]
    assert run(*args, "--prompt", "-").json["computed_tokens"] == len("What then?")


def test_a_prompt_that_is_not_utf8_is_refused(run: Run, precomputed: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    piped = run("generate", "--model", "model", "--prompt", "-")
    typed = run("generate", "--model", "model", "--prompt", "caf\udce9")
    assert (piped.code, typed.code) == (1, 1)
    assert "stdin is not UTF-8 text (byte 3)" in piped.err
    assert "the text is not UTF-8" in typed.err


def test_a_strange_file_name_becomes_a_label(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a:b\n.txt").write_text("Text.")
    assert run("precompute", "a:b\n.txt", "--model", "model").code == 0
    assert run("inspect", "--json").json["manifest"]["document"]["name"] == "a_b_.txt"


def test_chat_answers_follow_ups_and_forgets(run: Run, precomputed: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("One?\n\nTwo?\n/forget\nOne?\n"))
    ran = run("chat", "--model", "model", "--max-new-tokens", "3")
    lines = [line.removeprefix("> ") for line in ran.err.splitlines() if "cached tokens" in line]
    assert ran.code == 0
    assert [int(line.removeprefix("> ").split()[0]) for line in lines][0::2] == [200, 200]
    assert int(lines[1].removeprefix("> ").split()[0]) > 200


def test_another_model_exits_4_and_names_the_parts(run: Run, precomputed: Ran, save_model: Any) -> None:
    from conftest import tiny_llama

    other = str(save_model(tiny_llama(), seed=1))
    ran = run("generate", "--model", other, "--prompt", "x")
    assert (ran.code, ran.out) == (4, "")
    assert "  - weights: artifact " in ran.err
    ran = run("generate", "--model", other, "--prompt", "x", "--json")
    assert (ran.code, ran.json["kind"]) == (4, "MisfitError")


@pytest.mark.filterwarnings("default::kvbuy.errors.ProfileWarning")
def test_another_profile_is_said_in_one_warning(run: Run, precomputed: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbuy.models.processor_name", lambda device: "another")
    ran = run("generate", "--model", "model", "--prompt", "x", "--max-new-tokens", "2")
    (warning,) = [line for line in ran.err.splitlines() if line.startswith("warning")]
    assert "bit-exactness is not promised here; `kvbuy verify` measures it" in warning


def test_verify_of_an_honest_artifact_exits_0(run: Run, precomputed: Ran) -> None:
    ran = run("verify", "--model", "model", "--json")
    facts = ran.json
    assert (ran.code, facts["verdict"], facts["intact"], facts["fits"]) == (0, "exact", True, True)
    exact = {key: facts["exact"][key] for key in ("blocks_equal", "blocks", "tokens_equal", "tokens")}
    assert exact == {"blocks_equal": 4, "blocks": 4, "tokens_equal": 24, "tokens": 24}
    assert facts["exact"]["max_abs_logit_diff"] == 0.0
    for mode in ("continue", "align"):
        assert set(facts["drift"][mode]) == {
            "max_abs_logit_diff",
            "kl",
            "tokens_equal",
            "tokens",
            "first_divergence",
        }


def test_quick_verify_prints_one_table_with_one_verdict(run: Run, precomputed: Ran) -> None:
    ran = run("verify", "doc.kv.safetensors", "--model", "model", "--quick")
    assert ran.code == 0
    assert [line.split()[:2] for line in ran.out.splitlines() if line.startswith(" verdict")] == [
        ["verdict", "replayed"]
    ]


def test_a_damaged_artifact_exits_3(run: Run, precomputed: Ran) -> None:
    raw = bytearray(Path("doc.kv.safetensors").read_bytes())
    raw[-300] ^= 1
    Path("doc.kv.safetensors").write_bytes(raw)
    verify = run("verify", "--model", "model", "--json")
    generate = run("generate", "--model", "model", "--prompt", "x")
    assert (verify.code, verify.json["verdict"]) == (3, "damaged")
    assert (generate.code, generate.out) == (3, "")
    assert "does not match its digest" in generate.err


def test_inspect_prints_manifest_and_sizes(run: Run, precomputed: Ran) -> None:
    facts = run("inspect", "--json").json
    assert facts["id"] == precomputed.json["artifacts"][0]["id"]
    assert facts["bytes"] == Path("doc.kv.safetensors").stat().st_size
    assert facts["manifest"]["document"]["tokens"] == 200
    assert "whoever has this file can read the document" in " ".join(run("inspect").out.split())


def test_convert_prints_what_it_made(run: Run, precomputed: Ran) -> None:
    ran = run("convert", "doc.kv.safetensors", "--codec", "fast", "--json")
    facts = ran.json
    assert (ran.code, ran.err) == (0, "")
    assert facts.keys() == {"artifact", "id", "codec", "bytes", "kv_bytes", "ratio", "seconds"}
    assert (facts["artifact"], facts["codec"], facts["kv_bytes"]) == ("doc.fast.kv.safetensors", "fast", 51200)
    assert facts["bytes"] == Path("doc.fast.kv.safetensors").stat().st_size
    assert 0 < facts["ratio"] < 0.85
    inspected = run("inspect", "doc.fast.kv.safetensors", "--json").json
    assert {key: inspected[key] for key in ("id", "codec", "ratio")} == {
        key: facts[key] for key in ("id", "codec", "ratio")
    }
    assert f"(codec fast, {facts['ratio']:.3f} of the KV's size)" in " ".join(run("inspect").out.split())


def test_a_converted_artifact_answers_as_the_raw_one_and_verifies(run: Run, precomputed: Ran) -> None:
    ran = run("convert", "--out", "small.kv.safetensors")
    assert (ran.code, ran.err) == (0, "artifact: doc.kv.safetensors\n")
    assert "small.kv.safetensors" in ran.out
    args = ["--model", "model", "--prompt", "What then?", "--max-new-tokens", "4", "--json", "--kv"]
    answers = [run("generate", *args, f"{name}.kv.safetensors").json for name in ("doc", "small")]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert run("verify", "small.kv.safetensors", "--model", "model", "--quick", "--json").json["verdict"] == "replayed"


def test_converting_to_the_same_codec_exits_2(run: Run, precomputed: Ran) -> None:
    ran = run("convert", "doc.kv.safetensors", "--codec", "raw")
    assert (ran.code, ran.out) == (2, "")
    assert "has the codec raw already" in ran.err
    assert "hint: " in ran.err


def test_measure_takes_the_newest_artifact_and_needs_no_model(run: Run, precomputed: Ran) -> None:
    facts = run("measure", "--json").json
    assert (facts["artifact"], facts["kv_bytes"], facts["bytes_per_token"]) == ("doc.kv.safetensors", 51200, 256)
    assert facts["lossy"] == []
    shown = run("measure")
    assert (shown.code, shown.err.strip()) == (0, "artifact: doc.kv.safetensors")
    for word in ("zstd-19", "Gaussian", "K, ", "AWS*", "even, list"):
        assert word in shown.out


def test_measure_compares_lossy_encodings(run: Run, precomputed: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbuy.lossy.LONG", 24)
    facts = run("measure", "--lossy", "--model", "model", "--json").json
    assert facts["lossy"][0]["name"] == "exact"
    assert set(facts["lossy"][0]) >= {"name", "ratio", "tokens_equal", "tokens", "kl", "max_abs_logit_diff"}
    shown = run("measure", "--lossy", "--model", "model")
    assert (shown.code, "int8 a channel" in shown.out) == (0, True)


def test_measure_exits_3_for_a_damaged_artifact_and_4_for_another_model(
    run: Run, precomputed: Ran, save_model: Any
) -> None:
    from conftest import tiny_llama

    ran = run("measure", "--lossy", "--model", str(save_model(tiny_llama(), seed=1)))
    assert (ran.code, ran.out) == (4, "")
    raw = bytearray(Path("doc.kv.safetensors").read_bytes())
    raw[-5000] ^= 1  # in a block
    Path("doc.kv.safetensors").write_bytes(raw)
    assert run("measure", "--json").code == 3


def test_no_artifact_here_says_how_to_make_one(run: Run) -> None:
    ran = run("inspect")
    assert ran.code == 1
    assert "hint: make one: kvbuy precompute doc.txt" in ran.err
