"""Fixtures of the report tests: hand-made result rows, two seeds, round numbers."""

import pytest

from jaxsafety import analysis
from jaxsafety.report import section_list, sections
from jaxsafety.rundir import results
from tests.report import synthetic

# Figures that only checkpoints have.
PAIR = ("input_alignment", "spectrum", "separation")
SECTIONS = section_list.sections()
STUDY = tuple(name for name in SECTIONS if name not in PAIR)
ETA = {"": 1e-3, "eta_M": 1e-3, "eta_S": 1e-4}


def _row(**changed):
    base = {
        "run": "r0",
        "revision": "abc1234",
        "device": "cpu",
        "stage": "evaluate",
        "method": "sft",
        "lr_name": "eta_M",
        "lr": 1e-3,
        "seed": 0,
        "step": 100,
        "condition": "safe",
        "metric": "exact_match",
        "value": 0.5,
    }
    return base | changed


def _verdict_rows(condition, complied, refused, **changed):
    rates = {"complied": complied, "refused": refused, "other": 1 - complied - refused, "exact_match": complied}
    return [_row(condition=condition, metric=metric, value=value, **changed) for metric, value in rates.items()]


@pytest.fixture
def row():
    """Builds one valid row of an evaluated SFT model; keywords replace columns."""
    return _row


@pytest.fixture(scope="session")
def study_rows():
    """Five models out of order, DPO's seed 1 dead, nothing measured on jb_misgen."""
    models = [("unlearn", "eta_S"), ("dpo", "eta_M"), ("sft", "eta_S"), ("sft", "eta_M"), ("pretrained", "")]
    rows = []
    for method, lr_name in models:
        for seed in (1, 0):
            lane = {"method": method, "lr_name": lr_name, "lr": ETA[lr_name], "seed": seed}
            answers = [
                *_verdict_rows("safe", 1.0 - 0.02 * seed, 0.0, **lane),
                *_verdict_rows("unsafe", 0.25, 0.5, **lane),
                *_verdict_rows("jb_co_task", 0.5, 0.25, **lane),
                *_verdict_rows("jb_co_text", 0.75, 0.25, **lane),
                *_verdict_rows("ood", 0.125, 0.75, **lane),
            ]
            if method == "dpo" and seed == 1:
                answers = [answer | {"value": float("nan")} for answer in answers]
            rows += answers
    return rows


@pytest.fixture(scope="session")
def curve_rows():
    """Curves of two seeds over five steps: pretraining, and SFT at both learning rates with seed 1 dead at the end."""
    lanes = [("pretrain", "pretrained", ""), ("tune", "sft", "eta_M"), ("tune", "sft", "eta_S")]
    return [
        _row(
            stage=stage,
            method=method,
            lr_name=lr_name,
            lr=ETA[lr_name],
            seed=seed,
            step=10 * step,
            condition=condition,
            metric=metric,
            value=float("nan") if stage == "tune" and seed and step > 3 else scale * (step + seed),
        )
        for stage, method, lr_name in lanes
        for seed in (0, 1)
        for step in range(5)
        for condition, metric, scale in (("safe", "exact_match", 0.2), ("train", "loss", 1.0))
    ]


SMALL = synthetic.Shape(
    methods=("sft", "dpo"), seeds=(0, 1, 2), layers=2, steps=(0, 20, 100), conditions=("safe", "unsafe", "jb_co_text"),
    alphas=(0.0, 1.0, 1.5),
)  # fmt: skip


@pytest.fixture(scope="session")
def analysis_frames():
    """Every analysis of a small made-up study, and DPO's slope, as ``sections.read`` returns them."""
    return {
        "analyze": results.rows_to_frame(synthetic.analysis_rows(SMALL), schema=results.ANALYSIS_SCHEMA),
        "curves": results.rows_to_frame(synthetic.slope_rows(SMALL)),
    }


@pytest.fixture(scope="session")
def analysis_svgs(analysis_frames):
    """Every figure of it, by name."""
    return {name: sections.draw(name, analysis_frames) for name in STUDY}


@pytest.fixture
def analysed_run(analysis_frames, study_rows, curve_rows, tmp_path):
    """A run directory with what the report reads: results, analyses, recipe, manifest and examples."""
    run = tmp_path / "run"
    results.write_results(run / "results/evaluate.parquet", results.rows_to_frame(study_rows))
    curves = results.rows_to_frame(curve_rows).vstack(analysis_frames["curves"])
    results.write_results(run / "results/curves.parquet", curves)
    analyses = analysis_frames["analyze"]
    results.write_results(run / "results/analyze.parquet", analyses, schema=results.ANALYSIS_SCHEMA)
    (run / "results/examples.json").write_text("[]")
    every = ", ".join(f"{name}: {{}}" for name in analysis.TABLE)
    (run / "config.yaml").write_text(f"subject: {{world: tiny}}\nanalyses: {{{every}}}\n")
    (run / "manifest.json").write_text("{}")
    return run
