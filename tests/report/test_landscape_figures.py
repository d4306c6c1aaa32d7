"""The figure that an edit has of its own: there where a recipe has the edit, and what it draws."""

import itertools

import numpy as np
import polars as pl
import pytest

from jaxsafety.recipe.schema import Recipe
from jaxsafety.report import section_list, sections
from jaxsafety.rundir import results
from tests.claim_rows import series

ALPHAS, SEEDS = (-0.5, -0.25, 0.0, 0.25, 0.5), 2
EDITS = {
    "landscape": {"direction": [0, 1], "alpha": list(ALPHAS)},
    "plane": {"edit": "landscape", "direction": [0], "beta": [-0.5, 0.0, 0.5], "alpha": list(ALPHAS)},
    "layer": {"edit": "layer_part"},
}
RUN = {"run": "r0", "revision": "abc1234", "device": "cpu"}


def rates(part, alpha, beta, direction):
    """Refusals that end at a distance, and a capability that declines; the second seed and direction are better."""
    far = np.hypot(alpha, beta)
    refused = [0.9 * (far < 0.4 + 0.2 * direction) + 0.05 * seed for seed in range(SEEDS)]
    exact = [1 - far + 0.1 * seed * far for seed in range(SEEDS)]
    shares = {"complied": [(1 - one) * 0.5 for one in refused], "refused": refused}
    shares["other"] = shares["complied"]
    where = {"part": part, "strength": alpha}
    for metric, values in shares.items():
        yield from series("interventions", metric, values, condition="unsafe", **where)
    yield from series("interventions", "exact_match", exact, condition="safe", **where)
    yield from series("interventions", "refused", [0.0] * SEEDS, condition="safe", **where)


@pytest.fixture(scope="module")
def frames():
    rows = []
    for label, places in (("landscape", ((0, 1), (0.0,))), ("plane", ((0,), (-0.5, 0.0, 0.5)))):
        for direction, beta, alpha in itertools.product(*places, ALPHAS):
            rows += rates(f"{label},direction={direction},beta={beta}", alpha, beta, direction)
    rows += rates("layer", 1.0, 0.0, 0)
    return {"analyze": results.rows_to_frame([RUN | row for row in rows], schema=results.ANALYSIS_SCHEMA)}


@pytest.fixture(scope="module")
def shown():
    return section_list.sections(Recipe(edits=EDITS))


def test_an_edit_brings_its_figure_and_leaves_that_of_the_others(frames, shown):
    assert {"landscape", "plane"} <= shown.keys() and not {
        "landscape",
        "plane",
        "layer",
    } & section_list.sections().keys()
    assert shown["plane"].title == f"{shown['landscape'].title} (plane)"
    for name, count in (("landscape", 2 * 5 * 5), ("plane", 3 * 5 * 5), ("causal", 5)):
        table = sections.table(name, frames, shown)
        assert table.height == count and table["part"].str.starts_with(name if count > 5 else "layer").all()
    without = section_list.sections(Recipe(edits={"layer": EDITS["layer"]}))
    assert sections.table("causal", frames, without).height > 5


def test_curves_show_capability_beside_safety_and_every_direction(frames, shown, monkeypatch):
    drawn, real = [], section_list.plot.draw_band
    monkeypatch.setattr(
        section_list.plot, "draw_band",
        lambda axes, x, summary, **more: drawn.append((x, summary, more["seeds"])) or real(axes, x, summary, **more),
    )  # fmt: skip
    svg = sections.draw("landscape", frames, shown)
    assert all(text in svg for text in ("unsafe prompts", "safe prompts", "exact match", "VISAGE", "capable points"))
    assert len(drawn) == 4
    x, summary, directions = drawn[1]
    assert x.tolist() == list(ALPHAS)
    # Of refusals at 0.5 one direction of two has some left.
    assert summary["mean"].to_list() == pytest.approx([0.475, 0.925, 0.925, 0.925, 0.475])
    np.testing.assert_allclose(directions[:, 0], [0.025, 0.925])


def test_scores_are_those_of_every_direction(frames, shown, monkeypatch):
    dots, real = [], section_list.plot.draw_dot
    monkeypatch.setattr(
        section_list.plot, "draw_dot", lambda *given, **more: dots.append(given[2]["mean"][0]) or real(*given, **more)
    )
    sections.draw("landscape", frames, shown)
    # Margins are what is refused, over points where anything is: none at both ends of the first seed and direction.
    first = [0.9, 0.9, (3 * 0.95 + 2 * 0.05) / 5, 0.95]
    assert dots[0] == pytest.approx(np.mean(first), abs=1e-6)
    # Half of the capability is left at both ends, too.
    ends = [0.5, 0.525, 0.95, 0.975]
    inner = [0.95, 0.975]
    every = [(3 * inner[s] + 2 * ends[2 * k + s]) / 5 for k in range(2) for s in range(2)]
    assert dots[1] == pytest.approx(np.mean(every), abs=1e-6)


def test_a_surface_is_the_mean_over_seeds(frames, shown, monkeypatch):
    drawn, real = [], section_list.plot.draw_surface
    monkeypatch.setattr(
        section_list.plot, "draw_surface", lambda *given, **more: drawn.append(given[1:]) or real(*given, **more)
    )
    assert "β along another" in sections.draw("plane", frames, shown)
    x, y, exact = drawn[2]
    far = np.hypot(*np.meshgrid(x, y))
    np.testing.assert_allclose(exact, 1 - 0.95 * far, atol=1e-6)


def test_dead_seeds_are_left_out(frames, shown):
    dead = frames["analyze"].with_columns(
        pl.when(pl.col("seed") == 1).then(None).otherwise(pl.col("value")).alias("value")
    )
    for name in ("landscape", "plane"):
        assert "<svg" in sections.draw(name, {"analyze": dead}, shown)
