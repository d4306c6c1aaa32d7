"""Labelled arrays as tidy rows: every entry under its names, dead lanes null, undefined entries left out."""

import numpy as np
import polars as pl
import pytest

from jaxsafety.rundir import results
from jaxsafety.study import frames
from jaxsafety.types import Coordinate

LANES = dict(
    models=[("pretrained", "", 0.01, 0), ("sft", "eta_M", 0.002, 6)],
    seeds=(3, 5),
    finite=np.asarray([[True, True], [True, False]]),
)
PLACES = {
    "condition": Coordinate("condition", ("safe", "unsafe")),
    "layer": Coordinate("layer"),
    "alpha": Coordinate("strength", (0.5,)),
}
LABELS = {"analysis": "mine", "run": "r", "revision": "abc", "device": "cpu"}


def frame(arrays, **labels):
    return frames.to_frame(arrays, PLACES, **LANES, labels=LABELS | labels)


def test_every_entry_becomes_a_row_under_its_names():
    values = np.arange(2 * 2 * 2 * 3, dtype=np.float32).reshape(2, 2, 2, 3)
    got = frame({("tau", "condition layer"): values}, part="last")
    results.check_schema(got, "frame", schema=results.ANALYSIS_SCHEMA)
    assert got.height == values.size
    for h, model in enumerate(LANES["models"]):
        for s, seed in enumerate(LANES["seeds"]):
            for c, condition in enumerate(("safe", "unsafe")):
                for layer in range(3):
                    (row,) = got.filter(
                        method=model[0], step=model[3], seed=seed, condition=condition, layer=layer
                    ).to_dicts()
                    assert row["value"] == (values[h, s, c, layer] if LANES["finite"][h, s] else None)
                    assert (row["part"], row["subset"], row["strength"], row["metric"]) == ("last", "all", None, "tau")


def test_what_is_undefined_in_a_living_lane_has_no_row_and_a_dead_lane_has_a_null():
    values = np.asarray([[1.0, np.nan], [np.nan, 4.0]])
    got = frame({("cosine", ""): values})
    assert got.select("method", "seed", "value").rows() == [("pretrained", 3, 1.0), ("sft", 5, None)]


def test_axes_may_be_shorter_than_their_names_and_labels_win():
    got = frame({("norm", "alpha"): np.ones((2, 2, 1))}, condition="unsafe")
    assert set(got["strength"]) == {0.5} and set(got["condition"]) == {"unsafe"}
    assert set(frame({("gap", "layer"): np.ones((2, 2, 2))})["layer"]) == {0, 1}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("condition", r"tau has shape \(2, 3\), expected an axis for each of \['condition'\]"),
        (
            "conditions layer",
            "unknown axis of tau 'conditions': expected one of condition, layer, alpha; did you",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        frame({("tau", axes): np.ones((2, 2, 2, 3))})


def test_no_arrays_are_no_rows():
    assert frame({}).equals(pl.DataFrame(schema=results.ANALYSIS_SCHEMA))
