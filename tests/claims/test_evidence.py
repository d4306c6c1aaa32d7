import math

import numpy as np
import pytest

from jaxsafety.claims import evidence
from jaxsafety.claims.evidence import Model, Unmeasured
from tests.claim_rows import PRE, applied, gaps, series, table, taus


def test_rows_of_two_runs_are_refused():
    rows = gaps([[0.1, 0.2]])
    with pytest.raises(ValueError, match=r"two values of clusters/relative_gap for sft eta_M seed 0 at step 100"):
        evidence.gather(rows + rows)


def test_models_are_ordered_by_method_and_rate():
    methods = ("mine", "unlearn", "sft")
    rates = (("b", 1e-2), ("a", 1e-4), ("c", 1e-3))
    rows = [row | {"lr_name": name, "lr": lr} for m in methods for name, lr in rates for row in gaps([[0.0]], method=m)]
    found = evidence.gather(rows + gaps([[0.0]], **PRE) + gaps([[0.0]], method="dpo"))
    of_sft = tuple(Model("sft", name, lr) for name, lr in (("b", 1e-2), ("c", 1e-3), ("a", 1e-4)))
    assert found.models[:4] == (*of_sft, Model("dpo", "eta_M", 1e-3))
    assert [(model.method, model.lr_name) for model in found.strong] == [
        ("sft", "b"), ("dpo", "eta_M"), ("unlearn", "b"), ("mine", "b")
    ]  # fmt: skip
    assert [(model.method, model.lr_name) for model in found.weak] == [("sft", "a"), ("unlearn", "a"), ("mine", "a")]
    assert found.strongest("mine") == Model("mine", "b", 1e-2)
    with pytest.raises(Unmeasured, match="no other in this run"):
        found.strongest("other")


def test_attacks_are_apart_and_found():
    rows = table("complied", "unsafe", [0.1, 0.2]) + table("complied", "unsafe", [0.8, 0.9], method="attacked")
    found = evidence.gather(rows, others=("attacked",))
    assert [model.method for model in found.models] == [model.method for model in found.strong] == ["sft"]
    assert [model.method for model in found.others] == ["attacked"]
    values = found.find(evidence.TABLE, "complied", model=found.others[0], condition="unsafe")
    np.testing.assert_array_equal(values, [[0.8, 0.9]])
    assert evidence.gather(rows).others == () and len(evidence.gather(rows).models) == 2


def test_what_precedes_tuning_is_no_model():
    start = series("gradients", "gradient_cosine", [1.0], part="sft~dpo", **PRE)
    assert evidence.gather(start + gaps([[0.0]], **PRE)).models == ()


def test_what_only_earlier_steps_have_is_not_found():
    found = evidence.gather(applied("rank", [0.5], 4.0, step=50) + applied("whole", [0.5], 1.0, step=100))
    with pytest.raises(Unmeasured, match=r"no refused in interventions of SFT eta_M \(unsafe rank at 4\)"):
        found.find("interventions", "refused", model=found.models[0], condition="unsafe", part="rank", strength=4.0)
    with pytest.raises(Unmeasured, match=r"no refused in interventions of SFT eta_M \(unsafe rank\)"):
        found.by_strength("interventions", "refused", model=found.models[0], condition="unsafe", part="rank")


def test_strengths_are_ascending_and_parts_of_equal_strength_averaged():
    def attack(part, strength, value):
        return series("soft_tokens", "tau", [[value], [-value]], part=part, strength=strength, condition="unsafe")

    found = evidence.gather(attack("b", 20.0, 3.0) + attack("a", 20.0, 1.0) + attack("a", 5.0, 7.0))
    (model,) = found.models
    means = found.by_strength("soft_tokens", "tau", model=model, condition="unsafe")
    assert {strength: values.tolist() for strength, values in means.items()} == {5: [[7], [-7]], 20: [[2], [-2]]}
    assert list(means) == [5.0, 20.0]
    only = found.by_strength("soft_tokens", "tau", model=model, condition="unsafe", part="b")
    assert {strength: values.tolist() for strength, values in only.items()} == {20: [[3], [-3]]}


def test_find_stacks_layers_in_order_and_marks_missing_seeds():
    rows = gaps([[0.0, 0.1], [1.0, 1.1], [2.0, 2.1]])
    found = evidence.gather([row for row in rows[::-1] if (row["layer"], row["seed"]) != (1, 0)])
    values = found.find("clusters", "relative_gap", model=found.models[0], part="response")
    np.testing.assert_array_equal(values, [[0.0, 0.1], [math.nan, 1.1], [2.0, 2.1]])


def test_strengths_that_went_through_float32_are_found():
    found = evidence.gather(applied("whole", [0.5], float(np.float32(1.1))))
    assert found.find(
        "interventions", "refused", model=found.models[0], condition="unsafe", part="whole", strength=1.1
    ).tolist() == [[0.5]]


def test_unmeasured_is_not_a_value_error():
    """A caller's mistake must not be taken for a gap in the data."""
    assert not issubclass(Unmeasured, ValueError)


def test_all_models_have_all_layers_so_that_they_can_be_compared():
    found = evidence.gather(gaps([[0.0], [1.0]]) + gaps([[2.0], [3.0], [4.0]], method="dpo"))
    of_sft, of_dpo = (found.find("clusters", "relative_gap", model=model, part="response") for model in found.models)
    np.testing.assert_array_equal(of_sft, [[0.0], [1.0], [math.nan]])
    np.testing.assert_array_equal(of_dpo, [[2.0], [3.0], [4.0]])


def test_a_subset_without_any_prompt_is_undefined_and_not_unmeasured():
    found = evidence.gather(taus("jb_misgen", [[0.1, 0.2], [0.3, 0.4]]))
    (model,) = found.models
    look = {"model": model, "part": "response", "subset": "successful"}
    assert np.isnan(found.find("clusters", "relative_tau", condition="jb_misgen", **look)).tolist() == [[True] * 2] * 2
    with pytest.raises(Unmeasured, match=r"no relative_tau in clusters of SFT eta_M \(successful unsafe response\)"):
        found.find("clusters", "relative_tau", condition="unsafe", **look)
