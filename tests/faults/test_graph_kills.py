"""A graph of three generations with products, killed fifty times at random moments: the bits of an undisturbed run."""

import random
from dataclasses import replace

import pytest

from jaxsafety.recipe import yaml_file
from tests.disturbed import MAIN, assert_same_run, finish, kill_after_every_piece

KILLS = 50


@pytest.fixture(scope="module")
def recipe(mini_recipe):
    """21 lanes of four models, trained by four programs, in many chunks and with snapshots."""
    how = {"steps": 40, "chunk_steps": 4, "batch_size": 4, "snapshots": 2}
    models = {"pretrained": how | {"method": "pretrain", "snapshots": 0}}
    models |= {
        name: how | {"from": "pretrained", "method": name, "lr": {"eta_M": 1e-3, "eta_S": 1e-4}}
        for name in ("sft", "dpo")
    }
    models["attacked"] = how | {
        "from": ["sft", "dpo"], "method": "sft", "lr": [1e-3, 1e-4], "data": {"pool": "explicit", "prompts": [2, 3]},
    }  # fmt: skip
    return replace(mini_recipe, models=models, edits={}, attacks={}, analyses={"verdicts": {}})


@pytest.mark.faults
def test_a_graph_killed_fifty_times_ends_as_an_undisturbed_one(recipe, cache_directory, tmp_path, fault):
    (tmp_path / "graph.yaml").write_text(yaml_file.to_yaml(recipe))

    def words(directory):
        cache = ["--compilation_cache", cache_directory]
        return ["run", tmp_path / "graph.yaml", "--out", tmp_path / directory, *cache]

    finish(MAIN, *words("whole"))
    # Starting takes longer than a chunk: a kill is somewhere in the first few that a process adds.
    kills = kill_after_every_piece(
        words("torn"), tmp_path / "torn", random.Random(0), fault, longest=0.2, what="SIGKILL of a graph"
    )
    assert kills >= KILLS
    assert_same_run(tmp_path / "torn", tmp_path / "whole", [lane.name for lane in recipe.lanes])
