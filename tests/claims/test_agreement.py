"""Cohen's kappa against a table of counts in NumPy, and where it has no value."""

import numpy as np
import pytest

from jaxsafety.claims.agreement import cohen_kappa


def by_counts(table):
    table = np.asarray(table) / np.sum(table)
    chance = table.sum(0) @ table.sum(1)
    return (np.trace(table) - chance) / (1 - chance)


@pytest.mark.parametrize("table", [[[20, 5], [10, 15]], [[5, 1, 0], [2, 7, 3], [0, 4, 9]], [[0, 6], [6, 0]]])
def test_kappa_of_a_table(table):
    places = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    one, other = ([str(place[side]) for place in places] for side in (0, 1))
    assert cohen_kappa(one, other) == pytest.approx(by_counts(table), abs=1e-12)
    assert cohen_kappa(other, one) == pytest.approx(cohen_kappa(one, other), abs=1e-12)


def test_kappa_at_its_ends():
    assert by_counts([[20, 5], [10, 15]]) == pytest.approx(0.4)
    assert cohen_kappa("aab", "aab") == 1 and cohen_kappa("ab", "ba") == -1
    assert cohen_kappa("aaaa", "aabb") == 0 and cohen_kappa("aa", "aa") is None
    for one, other in (("a", "ab"), ("", "")):
        with pytest.raises(ValueError, match="must be as many, and some"):
            cohen_kappa(one, other)
