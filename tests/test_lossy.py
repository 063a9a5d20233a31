"""Lossy encodings on the tiny model: the control is exact, the rest is not, and the cache they change is a copy."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TEXT, SaveModel, tiny_llama
from test_cache import gemma3, mistral_all_sliding

from kvbuy.lossy import LossyMeasure, fp8_per_tensor, int8_per_channel, measure_lossy, negate_one_value
from kvbuy.models import Model, load_model
from kvbuy.prefill import precompute


@pytest.fixture(scope="module", autouse=True)
def long() -> Iterator[int]:
    """A long continuation that is not too long for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbuy.lossy.LONG", 40)
        yield 40


@pytest.fixture(scope="module")
def rows(llama: Model, long: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LossyMeasure]:
    path = tmp_path_factory.mktemp("lossy") / "doc.kv.safetensors"
    made = precompute(TEXT[:200], path, model=llama, name="doc.txt", block_size=64)
    return {row.name: row for row in measure_lossy(made.artifact, llama)}


def test_the_control_is_exact_and_everything_else_is_not(rows: dict[str, LossyMeasure]) -> None:
    exact, *others = rows.values()
    assert exact == LossyMeasure(
        name="exact",
        ratio=1.0,
        tokens_equal=24,
        tokens=24,
        tokens_equal_long=40,
        tokens_long=40,
        first_divergence=None,
        kl=0.0,
        max_abs_logit_diff=0.0,
    )
    assert [row.name for row in others] == ["int8 a channel", "fp8 e4m3 a tensor", "one value negated"]
    for row in others:
        assert row.kl > 0
        assert row.max_abs_logit_diff > 0


def test_the_first_difference_is_where_equal_tokens_end(rows: dict[str, LossyMeasure]) -> None:
    for row in rows.values():
        at = 40 if row.first_divergence is None else row.first_divergence
        assert at <= row.tokens_equal_long <= 40
        assert row.tokens_equal >= min(at, 24)


def test_ratios_count_codes_and_scales(rows: dict[str, LossyMeasure]) -> None:
    numbers, channels, tensors = 51200 // 2, 4 * 2 * 16, 4
    assert rows["int8 a channel"].ratio == (numbers + 4 * channels) / 51200
    assert rows["fp8 e4m3 a tensor"].ratio == (numbers + 4 * tensors) / 51200
    assert rows["one value negated"].ratio == 1.0


def test_int8_is_off_by_half_a_step_of_its_channel_at_most() -> None:
    states = torch.randn(2, 50, 16) * torch.logspace(-3, 3, 16)
    states[0, :, 0] = 0
    before = states.clone()
    assert int8_per_channel([states]) == states.numel() + 4 * 32
    steps = before.abs().amax(dim=1, keepdim=True) / 127
    assert ((states - before).abs() <= steps * 0.5001).all()
    assert not torch.equal(states, before)


def test_fp8_keeps_the_largest_value_and_three_bits_of_mantissa() -> None:
    states = torch.randn(2, 50, 16)
    before = states.clone()
    assert fp8_per_tensor([states]) == states.numel() + 4
    assert states.abs().max() == pytest.approx(before.abs().max())
    assert ((states - before).abs() <= before.abs() / 16 + before.abs().max() / 448 * 2**-9).all()
    assert not torch.equal(states, before)
    nothing = torch.zeros(1, 2, 2)
    fp8_per_tensor([nothing])
    assert torch.equal(nothing, torch.zeros(1, 2, 2))


def test_negating_changes_one_vector_of_one_value_tensor() -> None:
    tensors = [torch.ones(2, 9, 4) for _ in range(6)]
    negate_one_value(tensors)
    wrong = [(at, *place) for at, tensor in enumerate(tensors) for place in (tensor < 0).nonzero()[:, :2].tolist()]
    assert wrong == [(3, 0, 4)] * 4


def test_a_sliding_window_is_left_exact_and_counted_whole(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_model(str(save_model(gemma3())))
    made = precompute(TEXT[:200], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=64)
    exact, int8, *_ = measure_lossy(made.artifact, model)
    state = sum(tensor.size for tensor in made.artifact.manifest.state_tensors())
    whole = made.artifact.manifest.kv_bytes()
    assert (exact.kl, exact.ratio) == (0, 1)
    assert int8.ratio == ((whole - state) / 2 + 4 * 2 * 2 * 16 + state) / whole
    assert int8.kl > 0


def test_a_model_without_full_layers_has_nothing_to_lose(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_model(str(save_model(mistral_all_sliding())))
    made = precompute(TEXT[:50], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=16)
    assert {(row.ratio, row.kl) for row in measure_lossy(made.artifact, model)} == {(1.0, 0.0)}


def test_a_long_continuation_ends_where_the_context_does(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_model(str(save_model(tiny_llama(max_position_embeddings=140))))
    made = precompute(TEXT[:50], tmp_path / "a.kv.safetensors", model=model, name="a.txt", block_size=16)
    rest = 140 - 50 - len(made.artifact.manifest.receipt.prompt_tokens)
    assert 24 < rest < 256
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbuy.lossy.LONG", 256)
        assert {row.tokens_long for row in measure_lossy(made.artifact, model)} == {rest}
