"""The one sentence that a misspelt name gets."""

import pytest

from jaxsafety.config.names import check_name, nearest


def test_the_nearest_known_name_is_asked_for():
    assert nearest("evalute", ["pretrain", "evaluate"]) == "; did you mean 'evaluate'?"


def test_nothing_is_asked_where_no_name_looks_alike():
    assert nearest("xyz", ["pretrain", "evaluate"]) == ""
    assert nearest("xyz", []) == ""


def test_names_that_are_no_text_are_compared_as_text():
    assert nearest(100, [10, 1000]) == "; did you mean '1000'?"


def test_a_known_name_passes_and_an_unknown_one_is_one_sentence():
    check_name("world", "tiny", iter(["paper", "tiny"]))
    with pytest.raises(ValueError) as caught:
        check_name("world", "tinny", iter(["paper", "tiny"]))
    assert str(caught.value) == "unknown world 'tinny': expected one of paper, tiny; did you mean 'tiny'?"
