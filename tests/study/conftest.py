"""One graph of models that several files look at: three generations, edits, a selection, an adapter and a mask."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jaxsafety.cli import main as command
from jaxsafety.recipe import yaml_file
from jaxsafety.study import lanes, pipeline
from tests.once import made_once


@pytest.fixture(scope="session")
def graph(mini_recipe):
    """Two defences at two rates, an attack on all four with two numbers of prompts, and what is made of these."""
    how = {"steps": 2, "chunk_steps": 2, "batch_size": 4}
    tuned = how | {"from": "pretrained", "lr": {"eta_M": 1e-3, "eta_S": 1e-4}}
    mask = {"kind": "mask", "per": "row"}
    models = {
        "half": {"from": "attacked", "edit": "scaled", "alpha": [0.5, 1.5], "base": "parent"},
        "lent": {"from": "sft", "edit": "transferred", "alpha": 1.0, "other": "dpo"},
        "worst": {"select": "attacked", "per": ["from"], "role": "attack"},
        "pretrained": how | {"method": "pretrain"},
        "sft": tuned | {"method": "sft"},
        "dpo": tuned | {"method": "dpo", "weight_chosen": 1.0, "weight_rejected": 0.1},
        "attacked": how | {
            "from": ["sft", "dpo"], "method": "sft", "role": "attack", "data": {"pool": "explicit", "prompts": [2, 3]},
        },
        "again": how | {"from": "attacked", "method": "dpo", "reference": "root"},
        "adapted": how | {
            "from": "dpo", "method": "dpo", "parametrisation": {"kind": "lora", "rank": 2, "alpha": [1, 8]},
        },
        "masked": how | {
            "from": "attacked", "method": "dpo", "reference": "root", "lr": 1.0, "parametrisation": mask,
            "snapshots": 1,
        },
    }  # fmt: skip
    trained = ["pretrained", "sft", "dpo", "attacked", "again"]
    analyses = {label: {"on": trained} for label in ("verdicts", "output_space", "alignment", "undoing")}
    return replace(
        mini_recipe, models=models, strategy="map", edits={}, attacks={"prefill": {"depth": [0], "on": ["attacked"]}},
        analyses=analyses | {"clusters": {"on": ["sft.eta_M", "attacked"]}}
        | {label: {"on": ["sft.eta_M"]} for label in ("probe", "uncertainty")},
    )  # fmt: skip


def counting(traces: list[str]):
    """Returns ``lanes.train_chunk`` with chunks that note the label of their lane where they are traced."""
    build = lanes.train_chunk

    def counted(of_seed, lane):
        chunk = build(of_seed, lane)

        def steps_of_a_lane(*arguments):
            traces.append(lane.label)
            return chunk(*arguments)

        return steps_of_a_lane

    return counted


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """The labels of the lanes whose chunks are traced in a test, in turn."""
    traces: list[str] = []
    monkeypatch.setattr(lanes, "train_chunk", counting(traces))
    return traces


def train_counted(recipe, directory: Path) -> None:
    """Trains it on the command line; ``traces.json`` has what was traced: the models' chunks, and the read-outs."""
    traces, readout, prompts = [], lanes.readout, lanes.readout_prompts

    def read(*arguments):
        traces.append("readout")
        return readout(*arguments)

    def drawn(*arguments, **named):
        traces.append("prompts")
        return prompts(*arguments, **named)

    (directory / "study.yaml").write_text(yaml_file.to_yaml(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "_configure_jax", lambda *_, **__: None)
        patch.setattr(lanes, "train_chunk", counting(traces))
        patch.setattr(lanes, "readout", read)
        patch.setattr(lanes, "readout_prompts", drawn)
        for verb in ("pretrain", "tune"):
            assert command.main([verb, str(directory / "study.yaml"), "--out", str(directory / "run")]) == 0
    (directory / "traces.json").write_text(json.dumps(traces))


@pytest.fixture(scope="session")
def graph_run(graph, tmp_path_factory):
    """The study with all its models trained, in a directory that names its recipe; tests change copies."""
    directory = made_once(tmp_path_factory, "graph", lambda directory: train_counted(graph, directory))
    return pipeline.prepare(graph, directory / "run")
