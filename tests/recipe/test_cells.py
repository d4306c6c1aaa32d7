"""The cells of a grid: names, values, shards, and one sentence for every bad grid."""

from dataclasses import replace

import pytest

from jaxsafety.recipe import cells
from jaxsafety.recipe.schema import Recipe


@pytest.fixture
def over(mini_recipe):
    """Returns the miniature study with a grid."""
    return lambda **grid: replace(mini_recipe, grid={name.replace("__", "."): values for name, values in grid.items()})


def test_a_recipe_without_a_grid_is_one_cell(mini_recipe):
    assert cells.expand(mini_recipe) == (cells.Cell("", mini_recipe, {}),)


def test_every_combination_is_a_recipe_named_after_its_values(over, mini_recipe):
    found = cells.expand(over(subject__model__width=(16, 32), edits__rank__rank=([1], [1, 2])))
    assert [cell.name for cell in found] == [
        "width=16,rank=1",
        "width=16,rank=1+2",
        "width=32,rank=1",
        "width=32,rank=1+2",
    ]
    last = found[-1].recipe
    assert (last.subject.options.model.width, last.edits["rank"].options.rank, last.grid) == (32, (1, 2), {})
    assert last.name == f"mini-{found[-1].name}"
    assert replace(last, name="mini", subject=mini_recipe.subject, edits=mini_recipe.edits) == mini_recipe


def test_names_say_as_much_of_a_field_as_it_takes(over):
    grid = over(evaluate__prompts=(8, 16), analyze__prompts=(4,), evaluate__conditions=(["safe"], ["safe", "ood"]))
    assert [cell.name for cell in cells.expand(grid)][:2] == [
        "evaluate.prompts=8,analyze.prompts=4,conditions=safe",
        "evaluate.prompts=8,analyze.prompts=4,conditions=safe+ood",
    ]


def test_files_of_the_same_name_have_cells_of_their_own(mini_recipe):
    own = {"world": "tiny", "grammars": {"safe": "x"}}
    grid = replace(mini_recipe, subject=own, grid={"subject.grammars.safe": ("/a/mine.pcfg", "/b/mine.pcfg")})
    assert [cell.name for cell in cells.expand(grid)] == ["safe=1-mine", "safe=2-mine"]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_the_shards_hold_every_cell_once(over, parts):
    found = cells.expand(over(subject__model__layers=(1, 2, 3), subject__model__width=(16, 32)))
    shards = [cells.shard(found, f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(cell.name for shard in shards for cell in shard) == sorted(cell.name for cell in found)


@pytest.mark.parametrize("part", ["3/2", "0/2", "1/0", "-1/2", "1", "a/b", "", "1/" + "9" * 5000])
def test_a_bad_shard_is_named(part):
    with pytest.raises(ValueError, match=r"--shard must be i/n with 1 <= i <= n, such as 1/4, got"):
        cells.shard((), part)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("subject.model.widht", (1,), "unknown grid field 'subject.model.widht'.*; did you mean 'subject.model.wid"),
        ("model.width", (1,), "unknown grid field 'model.width'.*; did you mean 'subject.model.width'?"),
        ("subject.model", (1,), "'subject.model' is a section: expected one of its fields, such as 'subject.model.p"),
        ("evaluate", (1,), "'evaluate' is a section: expected one of its fields, such as 'evaluate.prompts'"),
        ("subject.model.width", (), "grid.subject.model.width must have at least one value, got none"),
        ("subject.model.width", (16, 16), "grid.subject.model.width must have distinct values, got"),
        ("evaluate.prompts", (1024, "1024"), "grid.evaluate.prompts must have distinct values, got"),
        (
            "subject.model.width",
            ("many",),
            "grid at subject.model.width=many: subject.model: width must be an integer, got 'many'",
        ),
        ("evaluate.batch_size", (0,), "grid at evaluate.batch_size=0: evaluate.batch_size must be > 0"),
        ("evaluate.batch_size", (3,), "grid at evaluate.batch_size=3: evaluate.prompts must be a multiple of evaluate"),
        ("models.sft.lr", (1e-3,), "a grid cannot run over 'models.sft.lr': list the values where the field is"),
        ("seeds", ((1,),), "a grid cannot run over 'seeds': seeds are an axis of every program already"),
        ("edits.whole.alpha", (tuple(i / 64 for i in range(64)),), "named after its values, of at most 255 bytes, got"),
        ("subject.model.width", tuple(range(10_001)), "grid must have at most 10000 cells, got 10001"),
        ("name", ("a",), "a grid cannot run over 'name'"),
    ],
)
def test_a_bad_grid_is_one_sentence(mini_recipe, field, values, message):
    with pytest.raises(ValueError, match=message):
        cells.expand(replace(mini_recipe, grid={field: values}))


def test_an_old_recipe_has_no_grid():
    assert Recipe().grid == {}
