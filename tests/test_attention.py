import pytest
import torch
from conftest import SaveModel, tiny_llama
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvbuy.attention import GROUPED, MANY_ROWS, STOCK, grouped_attention, stock_attention
from kvbuy.models import Model, load_model


class Heads(torch.nn.Module):
    num_key_value_groups = 3
    is_causal = True


def states(rows: int, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((1, 6, rows, 16), (1, 2, tokens, 16), (1, 2, tokens, 16))
    query, key, value = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize("rows", [1, 2, 14, MANY_ROWS, MANY_ROWS + 1])
def test_grouped_attention_is_attention(rows: int) -> None:
    query, key, value = states(rows, 200, torch.float32)
    mask = None
    if rows > 1:
        mask = torch.ones(rows, 200, dtype=torch.bool).tril(200 - rows)[None, None]
    wanted, _ = sdpa_attention_forward(Heads(), query, key, value, mask)
    found, _ = grouped_attention(Heads(), query, key, value, mask)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5


def test_rows_without_a_mask_run_stock_and_stay_causal() -> None:
    query, key, value = states(8, 8, torch.bfloat16)
    wanted, _ = sdpa_attention_forward(Heads(), query, key, value, None)
    found, _ = grouped_attention(Heads(), query, key, value, None)
    assert torch.equal(found, wanted)


def test_a_single_row_in_32_bits_runs_stock() -> None:
    query, key, value = states(1, 200, torch.float32)
    wanted, _ = sdpa_attention_forward(Heads(), query, key, value, None)
    found, _ = grouped_attention(Heads(), query, key, value, None)
    assert torch.equal(found, wanted)


def test_a_model_on_a_cpu_runs_grouped(save_model: SaveModel, llama: Model) -> None:
    full = load_model(str(save_model(tiny_llama(), dtype=torch.float32)))
    assert (llama.attention, full.attention) == (GROUPED, GROUPED)


def test_stock_attention_is_restored_afterwards(llama: Model) -> None:
    with stock_attention(llama.model):
        assert llama.model.config._attn_implementation == STOCK
    assert llama.model.config._attn_implementation == GROUPED
