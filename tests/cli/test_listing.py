"""What ``jaxsafety list`` says of subjects, and how it shows defaults that a factory makes."""

import dataclasses
import json
import re

import pytest

from jaxsafety import subjects
from jaxsafety.config import tables

HEADS = {
    "subjects": "`subject: {kind: NAME}` in a recipe, or one of your own as `subject: {kind: package.module:SUBJECT}`",
    "parametrisations": "`parametrisation: {kind: NAME}` in a recipe, or one of your own as "
    "`parametrisation: {kind: package.module:PARAMETRISATION}`",
    "methods": "`method: NAME` in a recipe, or one of your own as `method: package.module:METHOD`",
}


@pytest.mark.parametrize("folder", HEADS)
def test_a_folder_is_headed_by_how_a_recipe_names_what_is_in_it(main, capsys, folder):
    assert main("list") == 0
    assert f"{folder}, {HEADS[folder]}\n" in capsys.readouterr().out


def test_subjects_are_listed_with_their_fields(main, capsys):
    assert main("list", "--format", "json") == 0
    found = {(row["folder"], row["name"], row["field"]): row for row in json.loads(capsys.readouterr().out)}
    assert found["subjects", "world", "world"]["default"] == "'tiny'"
    assert found["subjects", "world", "grammars"]["default"] == "{}"
    assert found["subjects", "world", "model"]["default"] == "ModelConfig"
    assert {name for folder, name, _ in found if folder == "subjects"} == set(subjects.TABLE)


@pytest.mark.parametrize("name", subjects.TABLE)
def test_every_field_of_a_subject_is_told(name):
    """From its source, as is the help, so that no jax is imported."""
    told = tables.fields_of(subjects.TABLE[name])
    assert [one.name for one in told] == [one.name for one in dataclasses.fields(subjects.load(name).Config)]
    assert all(one.doc for one in told) and not any(re.search(r"field\(", one.default or "") for one in told)
    assert told[0].name == name, "a recipe tells a subject by its first field"
