"""The list of the figures of the analyses: what each is, how to read it, and which rows it is about."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import polars as pl

from jaxsafety.report import analysis_figures, attack_figures, intervention_figures, pair_figures, training_figures
from jaxsafety.report.plotting import Picture
from jaxsafety.report.seed_tables import BOUND


@dataclass(frozen=True)
class Section:
    """One figure of the analyses.

    Attributes:
        title: heading.
        paper: the figure of the paper, or what it goes beyond.
        reading: one sentence on how to read it.
        picture: seed table to picture; raises ``NothingToDraw``.
        rows: which rows of ``analyze.parquet`` (and of the tuning curves, as the analysis "curves") its table holds.
        claims: names of the claims that it bears on.
        steps: the finished models, or every step of training.
        layer_means: whether the table also holds means over layers, as rows without a layer.
    """

    title: str
    paper: str
    reading: str
    picture: Callable[[pl.DataFrame], Picture]
    rows: pl.Expr
    claims: tuple[str, ...] = ()
    steps: Literal["last", "all"] = "last"
    layer_means: bool = False


def _of(analysis: str, *metrics: str) -> pl.Expr:
    there = pl.col("analysis") == analysis
    return there & pl.col("metric").str.replace(BOUND, "$1").is_in(metrics) if metrics else there


_PART = pl.col("part")
# What two checkpoints have and a study has not, or shows otherwise.
_OF_PAIR = (pl.col("method") == "tuned").any()
_TRANSFER = _PART.str.starts_with("transfer:")

SECTIONS = {
    "clusters": Section(
        "Clusters of safe and unsafe activations",
        "Figure 3",
        "τ is how much nearer an activation lies to the mean of safe prompts than to that of unsafe ones, here as a "
        "share of the distance between the two means: the further the curves part, the cleaner the two clusters; "
        "below, the leading singular value's share of a cluster's spectrum is 1 where its activations lie on one line.",
        analysis_figures.clusters,
        _of("clusters"),
        claims=(
            "clusters_separate",
            "clusters_deepen",
            "clusters_rate",
            "clusters_dpo",
            "clusters_unlearn",
            "clusters_low_rank",
        ),
    ),
    "output_space": Section(
        "The update and the null space of the weights",
        "Figure 4",
        "Each leading output direction of the update is split into what the pretrained weights can write and the rest; "
        "a large rest alone says little, because a random direction has one too: only what exceeds the dotted line, "
        "drawn on top as the excess, is specific to safety fine-tuning.",
        analysis_figures.output_space,
        _of("output_space"),
        claims=(
            "null_space_up",
            "null_space_down",
        ),
    ),
    "input_alignment": Section(
        "What the update reads",
        "beyond the paper",
        "The same of the input side: each leading input direction of the update is split into what the weights before "
        "read and the rest; above the dotted line the update listens to directions that they hardly use, more than a "
        "random one would.",
        analysis_figures.input_alignment,
        _of("input_alignment"),
    ),
    "spectrum": Section(
        "How large the update is, and of what rank",
        "beyond the paper",
        "An update of low rank falls steeply, one that moves all directions alike is flat; below, the number of "
        "directions that hold 90 % of its energy, the energy in units of the strongest direction's, and its size "
        "beside that of the weights.",
        pair_figures.spectrum,
        (_of("spectrum") & pl.col("strength").is_in(pair_figures.PLACES))
        | (_of("output_space", "rank_delta", "stable_rank", "changed_norm") & _OF_PAIR),
    ),
    "separation": Section(
        "Separation by layer, and where jailbreaks lie",
        "Figures 3 and 7",
        "On top how often the nearer of the two means is that of a prompt's own label (chance is one half), and the "
        "difference of the labels' τ over its spread; below, the cosine form of τ: a jailbreak that runs with the safe "
        "prompts looks safe.",
        pair_figures.separation,
        _of("clusters", "accuracy", "effect_size", "cosine_tau") & _OF_PAIR,
    ),
    "input_space": Section(
        "The update on safe and on unsafe prompts",
        "Figure 5",
        "Gain, |a ΔW| / |a|, is how strongly the update answers to an activation, ratio, |a ΔW| / |a W|, the same "
        "beside the answer of the pretrained weights, and below, the gain in the deepest layer is spread over the "
        "update's input directions, each weighted with its singular value: the further unsafe lies above safe, the "
        "more the update is about unsafe prompts.",
        analysis_figures.input_space,
        _of("input_space"),
        claims=("acts_on_unsafe",),
    ),
    "sensitivity": Section(
        "Sensitivity to the prompt",
        "Figure 6",
        "The further right, the more the model's first answer token hangs on small changes of the prompt; compare a "
        "tuned model with the pretrained one, and safe with unsafe prompts within it.",
        analysis_figures.sensitivity,
        _of("sensitivity"),
        claims=(
            "sensitivity_unsafe",
            "sensitivity_safe",
        ),
    ),
    "jailbreaks": Section(
        "Jailbreaks, beside safe and unsafe prompts",
        "Figure 7",
        "Every row is a condition: the nearer the mark of a jailbreak is to that of safe prompts and the further from "
        "that of unsafe ones, the less the model tells the two apart; outlines are those prompts alone that the model "
        "complied with.",
        attack_figures.jailbreaks,
        (_of("clusters", "relative_tau") | _of("input_space", "gain") | _of("sensitivity", "gradient_norm"))
        & (pl.col("condition") != ""),
        claims=(
            "jailbreaks_nearer_safe",
            "jailbreaks_evade_update",
            "jailbreaks_sensitivity",
        ),
        layer_means=True,
    ),
    "soft_tokens": Section(
        "Soft tokens of growing strength",
        "Figure 7, right",
        "To the right the attack has more soft tokens and more steps: if compliance rises together with τ while the "
        "gain of the update falls, the attack works by making an unsafe prompt look safe.",
        attack_figures.soft_tokens,
        _of("soft_tokens"),
        claims=("stronger_attacks",),
        layer_means=True,
    ),
    "prefill": Section(
        "How deep a refusal reaches",
        "beyond the paper",
        "On the left the first k tokens of the complied answer are given: a refusal that falls steeply is only a few "
        "tokens deep; on the right, the position at which the model would first step over to the refusal.",
        attack_figures.prefill,
        _of("prefill"),
    ),
    "interventions": Section(
        "Scaling the update",
        "section 4.2",
        "α = 0 is the pretrained model, 1 the tuned one, and beyond 1 the update is overdone: where Null still rises "
        "there and Instruct holds, the method had stopped short; below, τ of the last prompt token and the sensitivity "
        "tell whether safe and unsafe part as the whole update grows (prompts whose first composition is harmless are "
        "not among these, so that rates differ a little from the accuracy table's).",
        intervention_figures.interventions,
        _of("interventions") & _PART.is_in(list(intervention_figures.SCALED)),
        claims=(
            "interpolation",
            "extrapolation_null",
            "extrapolation_cost",
        ),
    ),
    "causal": Section(
        "Which part of the update matters",
        "beyond the paper",
        "Each row keeps only one part of the update or all but it: a part that carries safety fine-tuning keeps Null "
        "high when alone and drops it when missing, more than a random part of the same size does.",
        intervention_figures.causal,
        # Of the whole update, as it is.
        _of("interventions")
        & _PART.is_in(list(intervention_figures.KEPT))
        & ((_PART != "whole") | (pl.col("strength") == 1)),
        claims=(
            "null_part_suffices",
            "null_part_beyond_range",
            "null_part_necessary",
            "mlp_beyond_attention",
        ),
    ),
    "transfer": Section(
        "Lending one method's update to another",
        "beyond the paper",
        "α times the update of the method above each column is added to the tuned model of each row: where Null rises "
        "and Instruct holds, the other method knows something this one had not learned.",
        intervention_figures.transfer,
        # The whole update alone is where every transfer starts.
        _of("interventions") & (_TRANSFER | ((_PART == "whole") & (pl.col("strength") == 1))),
    ),
    "dynamics": Section(
        "What changes when",
        "beyond the paper",
        "All panels share the training steps: what moves first in one panel and what follows in another suggests, but "
        "does not prove, what brings about what; dotted is the pretrained model.",
        training_figures.dynamics,
        ~_OF_PAIR
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
    "alignment": Section(
        "Are the methods different?",
        "beyond the paper",
        "Cosines and overlaps compare the updates of two methods: at the dotted line they are as unrelated as chance "
        "makes them, at 1 they are the same; a slope that stays near 0.5 says that DPO still trains as it began, "
        "weighting every pair alike.",
        training_figures.alignment,
        _of("alignment") | _of("curves", "rewards/slope"),
        claims=("dpo_like_unlearning",),
    ),
}
