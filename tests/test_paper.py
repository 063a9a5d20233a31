"""`cost --paper`: the paper's figures to their printed digits, from its own inputs."""

import pytest
from conftest import Run

from kvbuy.economics import tokens_usd
from kvbuy.paper import GPU_PRICE, LIST_PRICE, PAPER_TOKENS, paper_figures

FIGURES = {figure.name: figure for figure in paper_figures()}


@pytest.mark.parametrize(
    ("name", "digits", "printed"),
    [
        ("prefill : reuse", "{:.1f}x", "49.7x"),
        ("one prefill", "${:.4f}", "$0.0188"),
        ("egress of a load", "${:.3f}", "$0.049"),
        ("egress : the prefill it saves", "{:.1f}x", "2.6x"),
    ],
)
def test_a_figure_is_the_paper_s_to_its_printed_digits(name: str, digits: str, printed: str) -> None:
    assert digits.format(FIGURES[name].value) == FIGURES[name].printed == printed


@pytest.mark.parametrize(
    ("name", "digits", "printed"), [("80 M prefills", ".1f", "$1.5 M"), ("80 M reuses", ".2f", "$0.03 M")]
)
def test_millions_are_the_paper_s_to_their_printed_digits(name: str, digits: str, printed: str) -> None:
    assert f"${FIGURES[name].value / 1e6:{digits}} M" == FIGURES[name].printed == printed


def test_break_even_is_about_one_load() -> None:
    assert round(FIGURES["break-even loads N*"].value) == 1


def test_a_tariff_of_a_tenth_fits_inside_the_saving() -> None:
    tariff = FIGURES["80 M loads at a tariff of 0.1x"].value
    assert FIGURES["80 M reuses"].value < tariff < FIGURES["80 M prefills"].value


def test_the_paper_s_money_is_a_list_price_and_a_gpu_s_stands_beside_it() -> None:
    assert LIST_PRICE.usd_per_million_tokens == pytest.approx(4.97, abs=0.005)
    assert tokens_usd(PAPER_TOKENS, GPU_PRICE.usd_per_million_tokens) == pytest.approx(4.2e-5, rel=0.01)
    assert FIGURES["one prefill"].at_gpu_cost == pytest.approx(4.2e-5, rel=0.01)
    assert "4 B parameters, 2 FLOP a parameter and token, 500 TFLOP/s (assumed) at $2.50 an hour" in GPU_PRICE.basis


def test_every_figure_says_its_basis() -> None:
    assert {figure.basis.partition(":")[0] for figure in FIGURES.values()} == {
        "measured",
        "listed",
        "computed",
        "assumed",
    }


def test_cost_paper_needs_nothing_else(run: Run) -> None:
    shown = run("cost", "--paper", "--json").json
    assert [figure["printed"] for figure in shown["figures"]][:3] == ["49.7x", "$0.0188", "$1.5 M"]
    assert "$1.50 M" in run("cost", "--paper").out
