"""Audits: what honest artifacts and forgeries are called, on their own profile and on another."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TEXT, Ran, Run, SaveModel
from hypothesis import given
from hypothesis import strategies as st
from test_cache import gemma3

from kvbuy.artifact import Artifact
from kvbuy.audit import audit, calibrate
from kvbuy.errors import DamagedError, ExistsError, MisfitError, UsageError
from kvbuy.evidence import Envelope, Residual, choose_blocks, measure_residual, read_evidence, survival
from kvbuy.lossy import fp8_per_tensor, int8_per_channel
from kvbuy.models import Model, load_model
from kvbuy.plausible import find_lattices, judge_numbers
from kvbuy.prefill import Precomputed, precompute

SIZE = 64


def load_script(name: str) -> ModuleType:
    """A script as a module."""
    path = Path(__file__).parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


red_team = load_script("red_team")


def relabelled(artifact: Artifact, out: Path, **profile: str) -> Artifact:
    """An artifact that says that it was made on another profile, its block ids made to fit."""
    from kvbuy.artifact import write_artifact
    from kvbuy.manifest import chain_blocks

    manifest, ids = artifact.manifest, artifact.read_tokens()
    other = manifest.profile.model_copy(update=profile)
    digests = [block.digest for block in manifest.blocks]
    chain = chain_blocks(ids, fingerprint=manifest.fingerprint, profile=other, digests=digests)
    changed = manifest.model_copy(update={"profile": other, "blocks": chain})
    return write_artifact(out, changed, [artifact.path.read_bytes()[artifact.header_bytes :]], force=True)


@pytest.fixture(scope="module")
def findings(llama: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = red_team.red_team(llama, tmp_path_factory.mktemp("red"), tokens=5 * SIZE, block_size=SIZE)
    return {one.name: one for one in found}


EXPECTED = {
    "honest": ("exact", ()),
    "one value vector negated": ("inconsistent", (2,)),
    "one block's keys rotated": ("inconsistent", (2,)),
    "one mantissa bit, digests anew": ("inconsistent", (2,)),
    "32 tokens of another history, one block": ("inconsistent", (2,)),
    "the same, all later blocks computed from it": ("inconsistent", (2,)),
    "int8, a scale a vector": ("inconsistent", (0, 1, 2, 3, 4)),
    "int8, a scale a channel": ("inconsistent", (0, 1, 2, 3, 4)),
    "fp8": ("inconsistent", (0, 1, 2, 3, 4)),
    "another document's block": ("inconsistent", (2,)),
    "another layer's block": ("inconsistent", (2,)),
    "weights perturbed by 1 %": ("inconsistent", (0, 1, 2, 3, 4)),
    "one mantissa bit, digests as they were": ("damaged", ()),
}


def test_the_red_team_is_complete(findings: dict[str, Any]) -> None:
    assert set(findings) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_forgery_gets_its_verdict_and_its_blocks(findings: dict[str, Any], name: str) -> None:
    verdict, blocks = EXPECTED[name]
    assert findings[name].verdict == verdict
    assert set(blocks) <= set(findings[name].failed)
    assert 0 not in findings[name].failed or 0 in blocks


def test_history_that_was_computed_on_in_earnest_parts_in_one_block_only(findings: dict[str, Any]) -> None:
    assert findings["the same, all later blocks computed from it"].failed == (2,)


@pytest.mark.parametrize("name", ["int8, a scale a vector", "int8, a scale a channel", "fp8"])
def test_the_numbers_alone_give_codes_away(findings: dict[str, Any], name: str) -> None:
    assert not findings[name].numbers
    assert findings["honest"].numbers


def test_only_forgeries_of_codes_look_implausible(findings: dict[str, Any]) -> None:
    assert {name for name, one in findings.items() if not one.numbers} == {
        "int8, a scale a vector",
        "int8, a scale a channel",
        "fp8",
    }


def test_every_forgery_replays_the_receipt_that_was_made_with_it(findings: dict[str, Any]) -> None:
    assert all(one.replays for one in findings.values() if one.intact)


def test_equal_tokens_do_not_tell_codes_from_what_was_computed(findings: dict[str, Any]) -> None:
    forged = [one for one in findings.values() if one.intact and one.name != "honest"]
    assert sum(one.tokens_equal == 24 for one in forged) >= 3


def test_equal_seeds_choose_equal_blocks_and_all_where_there_are_few() -> None:
    assert choose_blocks(100, 3, seed=7) == choose_blocks(100, 3, seed=7) != choose_blocks(100, 3, seed=8)
    assert choose_blocks(3, 10, seed=0) == [0, 1, 2]


@given(st.integers(0, 2**62))
def test_any_block_may_be_chosen(seed: int) -> None:
    [one] = choose_blocks(5, 1, seed=seed)
    assert 0 <= one < 5


def test_a_damaged_artifact_is_not_audited(made: Precomputed, llama: Model) -> None:
    raw = bytearray(made.artifact.path.read_bytes())
    raw[-1] ^= 1
    made.artifact.path.write_bytes(raw)
    with pytest.raises(DamagedError):
        audit(made.artifact, llama, blocks=1, seed=0)


def test_a_model_with_windows_is_refused_with_the_way_out(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_model(str(save_model(gemma3())))
    made = precompute(TEXT[:100], tmp_path / "g.kv.safetensors", model=model, name="x", block_size=32)
    with pytest.raises(UsageError, match="cannot start in the middle") as error:
        audit(made.artifact, model, blocks=1, seed=0)
    assert "kvbuy verify" in (error.value.hint or "")


def make_foreign(text: str, llama: Model, folder: Path, name: str) -> Artifact:
    """What an honest publisher with another attention makes of a document."""
    llama.model.set_attn_implementation("eager")
    try:
        made = precompute(text, folder / f"{name}.eager.kv.safetensors", model=llama, name="x", block_size=SIZE)
    finally:
        llama.model.set_attn_implementation("kvbuy_grouped")
    return relabelled(made.artifact, folder / f"{name}.kv.safetensors", attention="eager")


@pytest.fixture
def foreign(llama: Model, tmp_path: Path) -> Artifact:
    return make_foreign(TEXT[:200], llama, tmp_path, "foreign")


@pytest.fixture
def trusted(llama: Model, tmp_path: Path) -> Artifact:
    """Another one, which is known to be honest."""
    return make_foreign(TEXT[200:800], llama, tmp_path, "trusted")


def test_text_over_other_tokens_is_not_audited(made: Precomputed, llama: Model, tmp_path: Path) -> None:
    from kvbuy.artifact import content_digest, write_artifact

    manifest = made.artifact.manifest
    text = made.artifact.read_text().encode()[::-1]
    document = manifest.document.model_copy(update={"text_digest": content_digest([text])})
    raw = made.artifact.path.read_bytes()[made.artifact.header_bytes : -len(text)]
    hidden = manifest.model_copy(update={"document": document})
    path = tmp_path / "hidden.kv.safetensors"
    with pytest.raises(DamagedError, match="token ids are not those of its text"):
        audit(write_artifact(path, hidden, [raw, text]), llama, blocks=1, seed=0)


def test_an_audit_of_nothing_is_refused(made: Precomputed, llama: Model) -> None:
    with pytest.raises(UsageError, match="one block at least"):
        audit(made.artifact, llama, blocks=0, seed=0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBUY_CACHE", str(tmp_path / "cache"))


def test_another_profile_is_unknown_until_it_is_measured_on_another_artifact(
    foreign: Artifact, trusted: Artifact, llama: Model
) -> None:
    found = audit(foreign, llama, blocks=9, seed=0)
    assert (found.verdict, found.failed_blocks) == ("unknown profile", ())
    assert any("attention" in difference for difference in found.differences)
    envelope, path = calibrate(trusted, llama)
    assert path.exists()
    assert max(one.worst for one in envelope.tensors) > 0
    assert audit(foreign, llama, blocks=9, seed=0).verdict == "consistent"
    assert audit(trusted, llama, blocks=9, seed=0).verdict == "unknown profile"
    with pytest.raises(ExistsError):
        calibrate(trusted, llama)


def test_a_forgery_is_outside_the_envelope_of_another_profile(
    foreign: Artifact, trusted: Artifact, llama: Model, tmp_path: Path
) -> None:
    calibrate(trusted, llama)
    blocks = red_team.read_blocks(foreign)
    for change in (lambda tensors: tensors[3][0, 5].neg_(), lambda tensors: red_team.rotate(tensors[0])):
        forged = red_team.changed(blocks, 1, change)
        path = tmp_path / "forged.kv.safetensors"
        found = audit(red_team.forge(llama, foreign, forged, path), llama, blocks=9, seed=0)
        assert found.verdict == "inconsistent"
        assert 1 in found.failed_blocks


def test_bits_are_compared_on_the_same_profile_so_nothing_is_calibrated(made: Precomputed, llama: Model) -> None:
    with pytest.raises(UsageError, match="this very profile"):
        calibrate(made.artifact, llama)


def test_equal_bits_of_another_profile_are_exact(made: Precomputed, llama: Model, tmp_path: Path) -> None:
    other = relabelled(made.artifact, tmp_path / "other.kv.safetensors", torch="2.99")
    assert audit(other, llama, blocks=2, seed=0).verdict == "exact"


def test_residuals_are_relative_lengths() -> None:
    computed = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    claimed = torch.tensor([[[3.0, 3.0], [0.0, 0.0]]], dtype=torch.bfloat16)
    found = measure_residual(red_team.as_array(claimed), red_team.as_array(computed), "BF16")
    assert (found.worst, found.mean) == pytest.approx((0.2, 0.1))
    nothing = measure_residual(red_team.as_array(computed), red_team.as_array(claimed * 0), "BF16")
    assert nothing.worst == 1e9


def test_an_envelope_is_the_farthest_of_each_tensor() -> None:
    blocks = [[Residual(mean=0.1, worst=0.5)], [Residual(mean=0.2, worst=0.3)]]
    assert Envelope.around(blocks, made_from="0" * 64).tensors == (Residual(mean=0.2, worst=0.5),)


def test_survival_is_the_chance_that_every_buyer_misses() -> None:
    assert survival(1, blocks=118, bad=1, checked=1) == pytest.approx(117 / 118)
    assert survival(1000, blocks=118, bad=1, checked=1) == pytest.approx(0.0002, abs=5e-5)
    assert survival(1, blocks=8, bad=1, checked=8) == 0
    assert survival(1, blocks=8, bad=2, checked=3) == pytest.approx((6 * 5 * 4) / (8 * 7 * 6))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_computed_numbers_lie_on_no_grid(dtype: Any) -> None:
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    torch.manual_seed(0)
    tensors = [torch.randn(2, 100, 64) * scale for scale in (0.01, 1.0, 30.0)]
    arrays = [red_team.as_array(tensor.to(kinds[dtype])) for tensor in tensors]
    assert list(find_lattices(arrays, 0, dtype=dtype)) == []
    typed = [tensor.to(kinds[dtype]) for tensor in tensors]
    forgeries = [red_team.encoded(typed, encode) for encode in (int8_per_channel, fp8_per_tensor)]
    for forged in (*forgeries, [red_team.int8_per_vector(tensor) for tensor in typed]):
        assert list(find_lattices([red_team.as_array(tensor) for tensor in forged], 0, dtype=dtype)) != []


def test_constants_have_too_little_entropy() -> None:
    torch.manual_seed(0)
    few = torch.randn(20).to(torch.bfloat16)
    block = [red_team.as_array(few[torch.randint(20, (2, 200, 64))]) for _ in ("key", "value")]
    found = judge_numbers([block], dtype="BF16")
    assert found.bits is not None
    assert found.bits < 5
    assert not found.holds


def test_few_values_say_nothing_about_entropy() -> None:
    found = judge_numbers([[np.zeros((1, 4, 8), dtype=np.uint16)] * 2], dtype="BF16")
    assert (found.bits, found.holds) == (None, True)


def test_the_verb_writes_evidence_that_can_be_run_again(run: Run, precomputed: Ran, tmp_path: Path) -> None:
    ran = run("audit", "--model", "model", "--blocks", "2", "--seed", "5", "--json")
    assert (ran.code, ran.json["verdict"], ran.json["blocks_checked"], ran.json["failed_blocks"]) == (0, "exact", 2, [])
    path = tmp_path / ran.json["evidence"]
    assert read_evidence(path).seed == 5
    assert "there already" in run("audit", "--model", "model", "--seed", "5").err
    again = run("audit", "--model", "model", "--replay", str(path), "--json")
    assert (again.code, again.json["agrees"]) == (0, True)
    lying = path.read_text().replace('"verdict": "exact"', '"verdict": "inconsistent"')
    path.write_text(lying.replace('"verdict":"exact"', '"verdict":"inconsistent"'))
    denied = run("audit", "--model", "model", "--replay", str(path))
    assert denied.code == 3
    assert "does not agree" in denied.out
    path.write_text(lying.replace('"seed": 5', '"seed": 6'))
    assert "not those that its seed chooses" in run("audit", "--model", "model", "--replay", str(path)).err
    facts = json.loads(lying)
    path.write_text(json.dumps(facts | {"blocks": []}))
    assert run("audit", "--model", "model", "--replay", str(path)).code == 3


def test_calibrating_asks_for_somebody_who_answers_for_it(
    run: Run, precomputed: Ran, llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBUY_KEYS", str(tmp_path / "keys"))
    other = make_foreign(TEXT[:200], llama, tmp_path, "foreign")
    ran = run("audit", str(other.path), "--model", "model", "--calibrate")
    assert (ran.code, "is not signed" in ran.err) == (3, True)
    assert run("audit", str(other.path), "--model", "model", "--calibrate", "--force", "--json").code == 0


def test_evidence_of_another_artifact_is_refused(run: Run, precomputed: Ran, tmp_path: Path) -> None:
    run("audit", "--model", "model", "--seed", "3")
    run("convert", "doc.kv.safetensors")
    ran = run("audit", "doc.fast.kv.safetensors", "--model", "model", "--replay", "doc.kv.safetensors.audit-3.json")
    assert ran.code == 2
    assert "not of doc.fast" in ran.err


def test_an_audit_can_ask_for_a_signature(
    run: Run, precomputed: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBUY_KEYS", str(tmp_path / "keys"))
    assert run("audit", "--model", "model", "--require-signature").code == 3
    run("keys", "new", "--owner", "Ann")
    run("sign")
    ran = run("audit", "--model", "model", "--require-signature")
    assert (ran.code, "signed by: trusted key" in ran.err) == (0, True)


def test_an_audit_says_what_it_means(run: Run, precomputed: Ran) -> None:
    shown = run("audit", "--model", "model", "--seed", "1")
    assert shown.code == 0
    assert "exact: the blocks that were computed again have the same bits" in " ".join(shown.out.split())


def test_another_model_is_a_misfit(run: Run, precomputed: Ran, save_model: SaveModel, tmp_path: Path) -> None:
    from conftest import tiny_llama

    other = save_model(tiny_llama(), seed=1)
    assert run("audit", "--model", str(other)).code == MisfitError.exit_code
