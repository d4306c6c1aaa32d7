"""The statements of Jain et al. 2024 as data: what each says, where, and the one number that can contradict it.

Compound statements are split, so that half of one can fail. Statements without a comparison or a number ("the update is
minimal") could not be contradicted and are not here.

References:
    Jain et al. (2024), arXiv 2407.10264. The statements are in our own words.

Fidelity:
    The paper shows means over runs without intervals; statistics and null values are ours. Where its quantity has no
    common scale over layers and methods (tau, sensitivity, the gain of an update), the statistic is the scale-free
    form. ``BEYOND`` marks what the paper does not state.
"""

from collections.abc import Callable
from functools import partial

from jaxsafety.claims import contrasts as c
from jaxsafety.claims.evidence import Evidence
from jaxsafety.claims.judging import Claim, Margin

BEYOND = "beyond the paper"

_METHODS = "mean over methods at eta_M"
_LAYERS = "mean over layers and methods at eta_M"
_ATTACKS = "mean over the jailbreaks and methods at eta_M that have any"
_LAYERS_ATTACKS = "mean over layers, and over the jailbreaks and methods at eta_M that have any"

# Smallest effects of interest: one for every kind of quantity, so that none follows from what a claim would like.
_SHARE = Margin(0.05, "five points of a hundred of a share, norm, cosine or relative distance, or of their difference")
_RATIO = Margin(0.095, "the logarithm of a ratio of 1.1: a tenth more or less")
_SLOPE = Margin(0.01, "a point of a hundred a step: over the five from layer to layer of the paper's model, five")
_STEP = Margin(0.2, "a fifth of a standard deviation: a small effect in Cohen's words")


def _changed(quantity: c.Quantity) -> Callable[[Evidence], c.Measurement]:
    """Tuned minus pretrained, mean over methods."""
    return partial(c.over_methods, quantity=partial(c.change, quantity=quantity))


CLAIMS = (
    Claim(
        "clusters_separate",
        "Safety fine-tuning drives the features of safe and unsafe prompts apart into clusters.",
        "Sec. 4.1, Fig. 3",
        f"relative gap (mean tau safe - mean tau unsafe) / (2 |mu_S - mu_U|), tuned minus pretrained; {_LAYERS}",
        measure=_changed(c.separation),
        margin=_SHARE,
    ),
    Claim(
        "clusters_deepen",
        "What tuning adds to the separation grows with depth.",
        "Sec. 4.1, Fig. 3",
        f"least-squares slope of the relative gap against the layer's index, tuned minus pretrained; {_METHODS}",
        measure=_changed(c.separation_slope),
        margin=_SLOPE,
    ),
    Claim(
        "clusters_rate",
        "The higher learning rate separates the clusters more.",
        "Sec. 4.1, Fig. 3",
        "relative gap at eta_M minus eta_S; mean over layers and methods",
        measure=partial(c.between_rates, quantity=c.separation),
        margin=_SHARE,
    ),
    Claim(
        "clusters_dpo",
        "DPO separates the clusters more than SFT.",
        "Sec. 4.1, Fig. 3",
        "relative gap of DPO minus SFT at eta_M; mean over layers",
        measure=partial(c.between_methods, quantity=c.separation, first="dpo", second="sft"),
        margin=_SHARE,
    ),
    Claim(
        "clusters_unlearn",
        "Unlearning separates the clusters more than SFT.",
        "Sec. 4.1, Fig. 3",
        "relative gap of unlearning minus SFT at eta_M; mean over layers",
        measure=partial(c.between_methods, quantity=c.separation, first="unlearn", second="sft"),
        margin=_SHARE,
    ),
    Claim(
        "clusters_low_rank",
        "The cluster of unsafe prompts becomes low in rank.",
        "Sec. 4.1",
        "share s_1 / sum s of the largest singular value of the centred unsafe features, tuned minus "
        f"pretrained; {_LAYERS}",
        measure=_changed(c.leading_share),
        margin=_SHARE,
    ),
    Claim(
        "null_space_up",
        "The update of the first MLP matrix writes into the null space of the weights, beyond chance.",
        "Sec. 4.2, Fig. 4",
        "|(I - P) u_j| of the first matrix minus its mean for random directions; P holds 90 % of the weight's "
        f"energy, u_j 90 % of the update's; mean over j; {_LAYERS}",
        measure=partial(c.over_methods, quantity=partial(c.null_excess, part="up")),
        margin=_SHARE,
    ),
    Claim(
        "null_space_down",
        "The update of the second MLP matrix writes into the null space of the weights, beyond chance.",
        "Sec. 4.2, Fig. 4",
        f"|(I - P) u_j| of the second matrix minus its mean for random directions; mean over j; {_LAYERS}",
        measure=partial(c.over_methods, quantity=partial(c.null_excess, part="down")),
        margin=_SHARE,
    ),
    Claim(
        "acts_on_unsafe",
        "The update acts on unsafe inputs more than on safe ones.",
        "Sec. 4.2, Fig. 5",
        f"ln of the mean |a dW| / |a| on unsafe over that on safe inputs of the first MLP matrix; {_LAYERS}",
        measure=partial(c.over_methods, quantity=c.preference),
        margin=_RATIO,
    ),
    Claim(
        "interpolation",
        "From the untuned to the tuned weights, every step along the update parts the clusters further.",
        "Sec. 4.2, text",
        "smallest change of the effect size, at the last prompt token, from one alpha in [0, 1] to the next; "
        f"{_LAYERS}",
        measure=partial(c.over_methods, quantity=c.smallest_step),
        margin=_STEP,
    ),
    Claim(
        "extrapolation_null",
        "Going beyond the tuned weights (alpha = 1.5) makes the weakest model refuse more.",
        "Sec. 4.2, text",
        "Null at alpha = 1.5 minus alpha = 1, of the model with the lowest Null in the accuracy table",
        measure=partial(c.extrapolation, condition="unsafe", metric="refused"),
        margin=_SHARE,
    ),
    Claim(
        "extrapolation_cost",
        "Going beyond the tuned weights (alpha = 1.5) costs the weakest model little on safe prompts.",
        "Sec. 4.2, text",
        "Instruct at alpha = 1.5 minus alpha = 1, of the model with the lowest Null in the accuracy table, in "
        "seeds with at least 0.05 to lose; a loss of 0.05 is no longer little",
        measure=partial(c.extrapolation, condition="safe", metric="exact_match", least=0.05),
        # The null value is a margin itself: being near it is no absence of an effect.
        null=-0.05,
    ),
    Claim(
        "sensitivity_unsafe",
        "The output becomes less sensitive to unsafe prompts.",
        "Sec. 4.3, Fig. 6",
        "ln of the mean gradient norm |d max logit / d prompt embeddings| on unsafe prompts, tuned minus "
        f"pretrained; {_METHODS}",
        measure=_changed(partial(c.log_sensitivity, condition="unsafe")),
        expected="below",
        margin=_RATIO,
    ),
    Claim(
        "sensitivity_safe",
        "The output becomes more sensitive to safe prompts.",
        "Sec. 4.3, Fig. 6",
        "ln of the mean gradient norm |d max logit / d prompt embeddings| on safe prompts, tuned minus "
        f"pretrained; {_METHODS}",
        measure=_changed(partial(c.log_sensitivity, condition="safe")),
        margin=_RATIO,
    ),
    Claim(
        "jailbreaks_nearer_safe",
        "Successful jailbreaks have features nearer to safe ones than unsafe prompts have.",
        "Sec. 5, Fig. 7",
        "relative tau of the jailbreak's prompts that the model complied with, minus that of unsafe prompts; "
        f"{_LAYERS_ATTACKS}",
        measure=partial(c.over_jailbreaks, quantity=c.nearness_to_safe),
        margin=_SHARE,
    ),
    Claim(
        "jailbreaks_evade_update",
        "The update acts on successful jailbreaks less than on unsafe inputs.",
        "Sec. 5, Fig. 7",
        "ln of the mean |a dW| / |a| on successful jailbreaks over that on unsafe inputs of the first MLP "
        f"matrix; {_LAYERS_ATTACKS}",
        measure=partial(c.over_jailbreaks, quantity=c.gain_on_attack),
        expected="below",
        margin=_RATIO,
    ),
    Claim(
        "jailbreaks_sensitivity",
        "The output is as sensitive to successful jailbreaks as to safe rather than unsafe prompts.",
        "Sec. 5, Fig. 7",
        f"|ln(g / g_unsafe)| - |ln(g / g_safe)| of the mean gradient norm g of successful jailbreaks; {_ATTACKS}",
        measure=partial(c.over_jailbreaks, quantity=c.sensitivity_like_safe),
        margin=_RATIO,
    ),
    Claim(
        "stronger_attacks",
        "The stronger a soft-token attack, the safer the prompt looks.",
        "Sec. 5, Fig. 7",
        "least-squares slope of the relative tau of attacked unsafe prompts, at the last prompt token, against the "
        "rank of the number of attack steps; mean over numbers of soft tokens, layers and methods at eta_M",
        measure=c.over_attacks,
        margin=_SLOPE,
    ),
    Claim(
        "rate_refuses",
        "The higher learning rate refuses more unsafe prompts.",
        "App., accuracy table",
        "Null at eta_M minus eta_S; mean over methods",
        measure=partial(c.between_rates, quantity=c.refusal),
        margin=_SHARE,
    ),
    Claim(
        "co_text_above_co_task",
        "JB-CO-Text is a stronger jailbreak than JB-CO-Task.",
        "App., accuracy table",
        f"share complied with, JB-CO-Text minus JB-CO-Task; {_METHODS}",
        measure=partial(c.over_methods, quantity=partial(c.success_beyond, condition="jb_co_text", other="jb_co_task")),
        margin=_SHARE,
    ),
    Claim(
        "misgen_above_co_task",
        "JB-MisGen is a stronger jailbreak than JB-CO-Task.",
        "App., accuracy table",
        f"share complied with, JB-MisGen minus JB-CO-Task; {_METHODS}",
        measure=partial(c.over_methods, quantity=partial(c.success_beyond, condition="jb_misgen", other="jb_co_task")),
        margin=_SHARE,
    ),
    Claim(
        "sft_above_dpo",
        "SFT is more susceptible to jailbreaks than DPO.",
        "App., accuracy table",
        "share of jailbreak prompts complied with, SFT minus DPO at eta_M; mean over the three jailbreaks",
        measure=partial(c.between_methods, quantity=c.susceptibility, first="sft", second="dpo"),
        margin=_SHARE,
    ),
    Claim(
        "sft_above_unlearn",
        "SFT is more susceptible to jailbreaks than unlearning.",
        "App., accuracy table",
        "share of jailbreak prompts complied with, SFT minus unlearning at eta_M; mean over the three jailbreaks",
        measure=partial(c.between_methods, quantity=c.susceptibility, first="sft", second="unlearn"),
        margin=_SHARE,
    ),
    Claim(
        "null_part_suffices",
        "The null-space part of the MLP update refuses more, alone, than a random part of the same dimension.",
        BEYOND,
        "Null with only the part of the update in the weight's output null space, minus only a random part; "
        f"{_METHODS}",
        measure=partial(c.over_methods, quantity=partial(c.part_beyond, part="only_null", other="only_random")),
        margin=_SHARE,
    ),
    Claim(
        "null_part_beyond_range",
        "The null-space part of the MLP update refuses more, alone, than the part in the weight's range.",
        BEYOND,
        f"Null with only the null-space part, minus only the in-range part (of another dimension); {_METHODS}",
        measure=partial(c.over_methods, quantity=partial(c.part_beyond, part="only_null", other="only_range")),
        margin=_SHARE,
    ),
    Claim(
        "null_part_necessary",
        "Without the null-space part of the MLP update, less is refused than without a random part.",
        BEYOND,
        f"Null with all but the null-space part, minus all but a random part of the same dimension; {_METHODS}",
        measure=partial(c.over_methods, quantity=partial(c.part_beyond, part="all_but_null", other="all_but_random")),
        expected="below",
        margin=_SHARE,
    ),
    Claim(
        "mlp_beyond_attention",
        "The MLP's part of the update refuses more, alone, than the attention's.",
        BEYOND,
        f"Null with only the MLP's update minus only the attention's; {_METHODS}",
        measure=partial(c.over_methods, quantity=partial(c.part_beyond, part="mlp", other="attention")),
        margin=_SHARE,
    ),
    Claim(
        "dpo_like_unlearning",
        "The updates of DPO and unlearning are more alike than either is to SFT's.",
        BEYOND,
        "cosine of the whole updates of DPO and unlearning at eta_M, minus the larger of their cosines with SFT's",
        measure=c.kinship,
        margin=_SHARE,
    ),
)
