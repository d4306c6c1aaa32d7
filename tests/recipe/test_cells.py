"""The cells of a grid: names, values, which go together, shards, and one sentence for every bad grid."""

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
    found = cells.expand(over(model__width=(16, 32), tune__methods__dpo__weight_rejected=(0.1, "2e-1")))
    assert [cell.name for cell in found] == [
        "width=16,weight_rejected=0.1", "width=16,weight_rejected=0.2",
        "width=32,weight_rejected=0.1", "width=32,weight_rejected=0.2",
    ]  # fmt: skip
    last = found[-1]
    assert (last.recipe.model.width, last.recipe.tune.methods["dpo"].options.weight_rejected, last.recipe.grid) == (
        32,
        0.2,
        {},
    )
    assert last.recipe.name == f"mini-{last.name}"
    same = {"name": "mini", "model": mini_recipe.model, "tune": mini_recipe.tune}
    assert replace(last.recipe, **same) == mini_recipe


def test_names_say_as_much_of_a_field_as_it_takes(over):
    grid = over(pretrain__steps=(6, 8), tune__steps=(6,), evaluate__conditions=(["safe"], ["safe", "ood"]))
    assert [cell.name for cell in cells.expand(grid)][:2] == [
        "pretrain.steps=6,tune.steps=6,conditions=safe",
        "pretrain.steps=6,tune.steps=6,conditions=safe+ood",
    ]


def test_files_of_the_same_name_have_cells_of_their_own(mini_recipe):
    grid = replace(mini_recipe, grammars={"safe": "x"}, grid={"grammars.safe": ("/a/mine.pcfg", "/b/mine.pcfg")})
    assert [cell.name for cell in cells.expand(grid)] == ["safe=1-mine", "safe=2-mine"]


def test_traced_scalars_share_a_program_and_the_rest_does_not(over):
    grid = over(
        tune__learning_rates__eta_M=(1e-3, 2e-3),
        tune__methods__dpo__weight_chosen=(0.5, 1.0),
        tune__batch_size=(4, 8),
        pretrain__learning_rate=(1e-3, 2e-3),
        model__width=(16, 32),
    )
    found = cells.expand(grid)
    families, groups = cells.families(found), cells.groups(found)
    assert [len(family) for family in families] == [16, 16]
    assert [len(group) for group in groups] == [4] * 8
    for group in groups:
        assert {cell.values["tune.batch_size"] for cell in group} == {group[0].values["tune.batch_size"]}
    # The learning rate of pretraining is an input of its program, and tuning does not know of it.
    assert len({cells.tuning_program(group[0]) for group in groups}) == 4


def test_a_pretraining_depends_on_its_own_fields_only(over):
    grid = over(tune__batch_size=(4, 8), model__width=(16, 32))
    shared = cells.pretraining(grid, cells.expand(grid))
    assert {name: source.name for name, source in shared.items()} == {
        "batch_size=4,width=16": "width=16", "batch_size=4,width=32": "width=32",
        "batch_size=8,width=16": "width=16", "batch_size=8,width=32": "width=32",
    }  # fmt: skip
    assert shared["batch_size=8,width=32"].recipe.tune == grid.tune
    alone = over(tune__batch_size=(4, 8))
    assert {source.name for source in cells.pretraining(alone, cells.expand(alone)).values()} == {"base"}


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_the_shards_hold_every_cell_once(over, parts):
    found = cells.expand(over(tune__batch_size=(1, 2, 3), model__width=(16, 32)))
    shards = [cells.shard(found, f"{i}/{parts}") for i in range(1, parts + 1)]
    assert sorted(cell.name for shard in shards for cell in shard) == sorted(cell.name for cell in found)


@pytest.mark.parametrize("part", ["3/2", "0/2", "1/0", "-1/2", "1", "a/b", "", "1/" + "9" * 5000])
def test_a_bad_shard_is_named(part):
    with pytest.raises(ValueError, match=r"--shard must be i/n with 1 <= i <= n, such as 1/4, got"):
        cells.shard((), part)


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("tune.batchsize", (1,), "unknown grid field 'tune.batchsize'.*; did you mean 'tune.batch_size'?"),
        ("tune.optim", (1,), "'tune.optim' is a section: expected one of its fields, such as 'tune.optim.algorithm'"),
        ("tune.batch_size", (), "grid.tune.batch_size must have at least one value, got none"),
        ("tune.batch_size", (4, "4"), "grid.tune.batch_size must have distinct values, got"),
        ("tune.batch_size", ("many",), "grid at tune.batch_size=many: tune.batch_size: expected an integer, got many"),
        ("tune.batch_size", (0,), "grid at tune.batch_size=0: tune.batch_size must be > 0"),
        ("tune.steps", (7,), "grid at tune.steps=7: tune.steps must be a multiple of chunk_steps, got 7 and 2"),
        ("seeds", ((1,),), "a grid cannot run over 'seeds': seeds are an axis of every program already"),
        ("edits.whole.alpha", (tuple(i / 64 for i in range(64)),), "named after its values, of at most 255 bytes, got"),
        ("tune.batch_size", tuple(range(10_001)), "grid must have at most 10000 cells, got 10001"),
        ("name", ("a",), "a grid cannot run over 'name'"),
    ],
)
def test_a_bad_grid_is_one_sentence(mini_recipe, field, values, message):
    with pytest.raises(ValueError, match=message):
        cells.expand(replace(mini_recipe, grid={field: values}))


def test_an_old_recipe_has_no_grid():
    assert Recipe().grid == {}
