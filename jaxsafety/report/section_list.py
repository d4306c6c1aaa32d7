"""The list of the figures of a run: one for each of its analyses and attacks, then those that join several.

What an analysis, an attack or an edit says of its own figure lies in its file; here is what no single one of them owns.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import polars as pl

from jaxsafety import analysis
from jaxsafety.analysis import output_space
from jaxsafety.recipe.nodes import AnalysisConfig, AttackConfig, EditConfig, default_attacks
from jaxsafety.recipe.schema import Recipe
from jaxsafety.report import (
    attack_figures,
    checkpoint_figures,
    intervention_figures,
    matrix,
    matrix_figure,
    plot,
    training_figures,
)
from jaxsafety.report.plotting import Picture
from jaxsafety.report.seed_tables import BOUND
from jaxsafety.types import Section


@dataclass(frozen=True)
class Shown:
    """One figure of a run; words and claims are those of a :class:`jaxsafety.types.Section`.

    Attributes:
        picture: seed table to picture; raises ``NothingToDraw``.
        rows: which rows of ``analyze.parquet`` (and of the tuning curves, as the analysis "curves") its table holds.
        steps: the finished models, or every step of training.
        layer_means: whether the table also holds means over layers, as rows without a layer.
        made: what the table holds in the place of these rows, of one value a seed as they are.
    """

    title: str
    paper: str
    reading: str
    picture: Callable[[pl.DataFrame], Picture]
    rows: pl.Expr
    claims: tuple[str, ...] = ()
    steps: Literal["last", "all"] = "last"
    layer_means: bool = False
    made: Callable[[pl.DataFrame], pl.DataFrame] | None = None


def sections(recipe: Recipe | None = None) -> dict[str, Shown]:
    """Returns the figures of a study by name; those of all analyses without a recipe.

    What is measured of checkpoints lies in rows of the synthetic study's analyses, and is drawn as theirs.
    """
    analyses = {} if recipe is None else recipe.analyses
    if recipe is None or recipe.subject.of_files:
        analyses = analyses | {name: AnalysisConfig(name) for name in analysis.TABLE}
    attacks = recipe.attacks if recipe else default_attacks()
    drawn = {label: _of_analysis(label, node) for label, node in analyses.items() if node.load().section}
    attacked = {label: _of_attack(label, node) for label, node in attacks.items()}
    edits = recipe.edits if recipe else {}
    edited = {label: _of_edit(label, node) for label, node in edits.items() if node.load().section}
    # What has a figure of its own is no row of that of the others.
    apart = pl.any_horizontal(pl.lit(False), *(shown.rows for shown in edited.values()))
    joint = _JOINT | {"causal": replace(_JOINT["causal"], rows=_JOINT["causal"].rows & ~apart)}
    crossed = {"matrix": _of_matrix(recipe)} if recipe and matrix.has_matrix(recipe) else {}
    return crossed | drawn | _OF_UPDATES | _JAILBREAKS | attacked | joint | edited


def _of(analysis: str, *metrics: str) -> pl.Expr:
    there = pl.col("analysis") == analysis
    return there & pl.col("metric").str.replace(BOUND, "$1").is_in(metrics) if metrics else there


def _of_matrix(recipe: Recipe) -> Shown:
    return Shown(
        "Every defence against every attack",
        "beyond the paper",
        "What is complied with of the unsafe prompts, in per cent, the most robust defence on top; hatched attacks "
        "cost it more than a twentieth of its safe prompts. An attack of several strengths is shown at the one that "
        "does most over all defences. In the last column every seed is under the attack that does most to the other "
        "seeds at no such cost. Intervals, seeds and safe prompts stand under the pointer, and in the table.",
        matrix_figure.picture,
        _of(matrix.EVALUATED) | _of(matrix.EDITED, "complied", "exact_match") | pl.col("metric").eq("complied"),
        made=partial(matrix.rows, recipe=recipe),
    )


def _of_analysis(label: str, node: AnalysisConfig) -> Shown:
    section: Section = node.load().section
    rows = _of(label)
    for analysis_, *metrics in section.also:
        rows |= _of(analysis_, *metrics)
    # What is drawn of an analysis goes by its own name, whatever its label.
    own = node.analysis if node.analysis in analysis.TABLE else label

    def picture(table: pl.DataFrame) -> Picture:
        return section.draw(table.with_columns(pl.col("analysis").replace({label: own})), plot)

    title = section.title if own == label or own != node.analysis else f"{section.title} ({label})"
    return Shown(title, section.paper, section.reading, picture, rows, claims=section.claims)


def _of_attack(label: str, node: AttackConfig) -> Shown:
    told = node.load().section
    words: tuple[Any, ...] = told[:3] if told else (f"The attack {label}", "beyond the paper", _STRONGER)
    names = [name for point in node.points()[:1] for name in point]
    picture = partial(attack_figures.attack, label=label, over=names[-1] if names else "")
    if told and label != node.attack:
        words = (f"{told.title} ({label})", *words[1:])
    return Shown(*words, picture, _of(label), claims=told.claims if told else (), layer_means=True)


def _of_edit(label: str, node: EditConfig) -> Shown:
    section: Section = node.load().section
    title = section.title if label == node.edit else f"{section.title} ({label})"
    rows = _of("interventions") & (_PART.is_in([label]) | _PART.str.starts_with(f"{label},"))
    return Shown(title, section.paper, section.reading, lambda table: section.draw(table, plot), rows, section.claims)


_STRONGER = "To the right the attack is stronger: how many prompts the model still refuses, and how many it obeys."
_PART = pl.col("part")
# What studies of checkpoints have and others have not, or show otherwise: told by metrics that they alone have.
_OF_CHECKPOINTS = pl.col("metric").is_in(["value_base", "cosine_tau_n"]).any()
_TRANSFER = _PART.str.starts_with("transfer:")
_DIRECTIONS = _PART.str.starts_with(intervention_figures.DIRECTIONS)

_OF_UPDATES = {
    "input_alignment": Shown(
        "What the update reads",
        "beyond the paper",
        "The same of the input side: each leading input direction of the update is split into what the weights before "
        "read and the rest; above the dotted line the update listens to directions that they hardly use, more than a "
        "random one would.",
        lambda table: output_space.draw_null_spaces(
            table, plot, analysis="input_alignment", name="input directions of the update in the null space"
        ),
        _of("input_alignment"),
    ),
    "spectrum": Shown(
        "How large the update is, and of what rank",
        "beyond the paper",
        "An update of low rank falls steeply, one that moves all directions alike is flat; below, the number of "
        "directions that hold 90 % of its energy, the energy in units of the strongest direction's, and its size "
        "beside that of the weights.",
        checkpoint_figures.spectrum,
        (_of("spectrum") & pl.col("strength").is_in(checkpoint_figures.PLACES))
        | (_of("output_space", "rank_delta", "stable_rank", "changed_norm") & _OF_CHECKPOINTS),
    ),
    "separation": Shown(
        "Separation by layer, and where jailbreaks lie",
        "Figures 3 and 7",
        "On top how often the nearer of the two means is that of a prompt's own label (chance is one half), and the "
        "difference of the labels' τ over its spread; below, the cosine form of τ: a jailbreak that runs with the safe "
        "prompts looks safe.",
        checkpoint_figures.separation,
        _of("clusters", "accuracy", "effect_size", "cosine_tau") & _OF_CHECKPOINTS,
    ),
}
_JAILBREAKS = {
    "jailbreaks": Shown(
        "Jailbreaks, beside safe and unsafe prompts",
        "Figure 7",
        "Every row is a condition: the nearer the mark of a jailbreak is to that of safe prompts and the further from "
        "that of unsafe ones, the less the model tells the two apart; outlines are those prompts alone that the model "
        "complied with.",
        attack_figures.jailbreaks,
        (_of("clusters", "relative_tau") | _of("input_space", "gain") | _of("sensitivity", "gradient_norm"))
        & (pl.col("condition") != ""),
        claims=("jailbreaks_nearer_safe", "jailbreaks_evade_update", "jailbreaks_sensitivity"),
        layer_means=True,
    ),
}
_JOINT = {
    "interventions": Shown(
        "Scaling the update",
        "section 4.2",
        "α = 0 is the pretrained model, 1 the tuned one, and beyond 1 the update is overdone: where Null still rises "
        "there and Instruct holds, the method had stopped short; below, τ of the last prompt token and the sensitivity "
        "tell whether safe and unsafe part as the whole update grows (prompts whose first composition is harmless are "
        "not among these, so that rates differ a little from the accuracy table's).",
        intervention_figures.interventions,
        _of("interventions") & _PART.is_in(list(intervention_figures.SCALED)),
        claims=("interpolation", "extrapolation_null", "extrapolation_cost"),
    ),
    "causal": Shown(
        "Which part of the update matters",
        "beyond the paper",
        "Each row keeps only one part of the update or all but it: a part that carries safety fine-tuning keeps Null "
        "high when alone and drops it when missing, more than a random part of the same size does.",
        intervention_figures.causal,
        # Of the whole update, as it is.
        _of("interventions")
        & ~_TRANSFER
        & ~_DIRECTIONS
        & ~_PART.is_in([part for part in intervention_figures.SCALED if part != "whole"])
        & ((_PART != "whole") | (pl.col("strength") == 1)),
        claims=("null_part_suffices", "null_part_beyond_range", "null_part_necessary", "mlp_beyond_attention"),
    ),
    "directions": Shown(
        "How many directions of the update it takes",
        "beyond the paper",
        "The update of the MLP matrices is cut to a few output directions, everything else of the update stays: where "
        "a curve is near its right end already, so many directions do what the whole update does, and a choice of "
        "directions that says something gets there with fewer than a random one.",
        intervention_figures.directions,
        _of("interventions") & _DIRECTIONS,
        claims=("mlp_carries_refusals", "directions_beyond_random", "activations_beyond_size"),
    ),
    "transfer": Shown(
        "Lending one method's update to another",
        "beyond the paper",
        "α times the update of the method above each column is added to the tuned model of each row: where Null rises "
        "and Instruct holds, the other method knows something this one had not learned.",
        intervention_figures.transfer,
        # The whole update alone is where every transfer starts.
        _of("interventions") & (_TRANSFER | ((_PART == "whole") & (pl.col("strength") == 1))),
    ),
    "dynamics": Shown(
        "What changes when",
        "beyond the paper",
        "All panels share the training steps: what moves first in one panel and what follows in another suggests, but "
        "does not prove, what brings about what; dotted is the pretrained model.",
        training_figures.dynamics,
        ~_OF_CHECKPOINTS
        & (
            _of("verdicts", "exact_match", "refused")
            | (_of("interventions", "refused", "exact_match") & _PART.is_in(["only_null", "all_but_null"]))
            | _of("clusters", "relative_gap")
            | _of("output_space", "excess")
            | _of("input_space", "gain")
            | _of("sensitivity", "gradient_norm")
        ),
        steps="all",
        layer_means=True,
    ),
}
