"""``python -m experiments.resistance RUN``: is it told beforehand which defences further training undoes?

Of a matrix, whose defences are the units: means over seeds of what is measured of every defence before any attack,
beside what is complied with after the worst further training, alone and beyond what everybody would look at first, the
compliance before the attack.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from scipy import stats

from jaxsafety.claims import prediction
from jaxsafety.recipe import yaml_file
from jaxsafety.report import matrix, sections
from jaxsafety.rundir import printed

# What may tell it: labels of rows by what it is called. Over layers and parts they are means.
QUANTITIES: Mapping[str, Mapping[str, str]] = {
    "compliance before": {"analysis": "evaluate", "metric": "complied", "condition": "unsafe"},
    "safe prompts before": {"analysis": "evaluate", "metric": "exact_match", "condition": "safe"},
    "size of the update": {"analysis": "output_space", "metric": "changed_norm"},
    "null-space energy beyond chance": {"analysis": "output_space", "metric": "excess_energy"},
    "stable rank of the update": {"analysis": "output_space", "metric": "stable_rank"},
    "separation of safe and unsafe": {"analysis": "clusters", "metric": "relative_gap", "part": "last"},
    "sensitivity to unsafe prompts": {
        "analysis": "sensitivity", "metric": "gradient_norm_log", "condition": "unsafe", "subset": "all"
    },
    "compliance under noise": {"analysis": matrix.MATRIX, "metric": "complied", "condition": "noise"},
}  # fmt: skip
CONTROL = "compliance before"
# What could be behind a correlation: how much there was to win, how able a model is, how far it has moved.
CONTROLS = (CONTROL, "safe prompts before", "size of the update")
OUTCOME = {"analysis": matrix.MATRIX, "metric": "complied", "condition": "worst_tuned"}
# The share of discoveries that may be wrong.
RATE = 0.05


def measured(run: Path) -> pl.DataFrame:
    """Returns a row for every defence: its name, the outcome and every quantity, means over seeds.

    Raises:
        ValueError: the run has no matrix, or a file is damaged.
    """
    recipe = yaml_file.recorded(run)
    if recipe is None or not matrix.has_matrix(recipe):
        raise ValueError(f"{run} has no matrix: expected a study of defences and attacks")
    rows = sections.last_steps(sections.every_row(sections.read(run)))
    rows = pl.concat([rows, matrix.rows(rows, recipe=recipe)])
    defences = [lane for lane in recipe.lanes if lane.how.role == "defence"]
    found = []
    for lane in defences:
        own = rows.filter(pl.col("method") == lane.label, pl.col("lr_name") == lane.point)
        values = {name: _mean(own, labels) for name, labels in ({"outcome": OUTCOME} | dict(QUANTITIES)).items()}
        found.append({"defence": lane.name} | values)
    return pl.DataFrame(found)


def _mean(rows: pl.DataFrame, labels: Mapping[str, str]) -> float:
    own = rows.filter(*(pl.col(name) == value for name, value in labels.items()))
    # Seeds weigh the same, whatever layers they have.
    value = own.group_by("seed").agg(pl.col("value").mean())["value"].mean()
    return float("nan") if value is None else value


def table(run: Path) -> str:
    """Returns what predicts the outcome, as a Markdown table and what could have been seen."""
    found = measured(run)
    columns = {name: found[name].to_numpy().astype(float) for name in ("outcome", *QUANTITIES)}
    # What a recipe does not measure is left out.
    names = [name for name in QUANTITIES if not np.isnan(columns[name]).all()]
    alone, held = ({name: _predicted(columns, name, controls) for name in names} for controls in (1, len(CONTROLS)))
    adjusted = dict(zip(names, _adjusted([one.p for one in alone.values()]), strict=True))
    cells = [
        [name, f"{one.correlation:+.2f}", _interval(one), f"{one.p:.2g}", "yes" if adjusted[name] <= RATE else "no",
         _interval(held[name]), f"{one.gain:+.2f}"]
        for name, one in alone.items()
    ]  # fmt: skip
    heads = ["before any attack", "rank correlation", f"beyond {CONTROL}", "p", "found", "beyond all three", "gain"]
    count = min(one.n for one in alone.values())
    seen = [prediction.detectable(count, controls=controls) for controls in (1, len(CONTROLS))]
    return printed.pipe_table(heads, cells, numbers=(1, 2, 3, 5, 6)) + (
        f"\nWhat {count} defences comply with after the worst further training that costs little. *Beyond*: rank "
        "correlation of what that leaves of both, with a 95 % interval; a quantity is not among its own controls. *All "
        f"three*: {', '.join(CONTROLS)}, which may be behind a correlation. *Found*: at a false discovery rate of "
        f"{RATE:g} (Benjamini-Hochberg). *Gain*: by which share the error on a defence that was left out falls beside "
        f"{CONTROL}. Correlations of {seen[0]:.2f} and {seen[1]:.2f} would have been seen with a chance of 80 % beyond "
        "one and three. Defences are no random sample: some are relatives of each other.\n"
    )


def _predicted(columns: Mapping[str, np.ndarray], name: str, controls: int) -> prediction.Prediction:
    own = [columns[control] for control in CONTROLS[:controls] if control != name]
    others = np.column_stack(own) if own else np.empty((len(columns[name]), 0))
    return prediction.predicted(columns["outcome"], columns[name], others=others)


def _interval(one: prediction.Prediction) -> str:
    return f"{one.partial:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"


def _adjusted(values: list[float]) -> list[float]:
    """Benjamini-Hochberg's; one that has no number is none."""
    known = [index for index, value in enumerate(values) if np.isfinite(value)]
    found = np.ones(len(values))
    found[known] = stats.false_discovery_control([values[index] for index in known])
    return found.tolist()


def main() -> None:
    """Prints the table of the command line's run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    print(table(parser.parse_args().run))


if __name__ == "__main__":
    main()
