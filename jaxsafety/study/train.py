"""Makes the models of a study, group by group of lanes: trained, edited, selected, or reused from another run.

Everything can be killed and started again; a finished lane is not made again. Lanes that agree in all but traced
scalars and all seeds of them are one program; so are groups of equally many lanes, whatever they begin with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsafety.engine import hosts, legs, loop, programs
from jaxsafety.recipe import graph
from jaxsafety.recipe.lane import Lane
from jaxsafety.recipe.models import Edited, Reused, Selected
from jaxsafety.rundir import manifest_file
from jaxsafety.study import lanes, pipeline
from jaxsafety.study.pipeline import Study, Trained
from jaxsafety.types import HParams, Metrics, Params, TrainState

# Parameters ``[h, s, ...]`` of lanes by role; and what makes programs.
Trees = Mapping[str, Trained]
Make = Callable[..., Callable[..., Any]]


def points(group: Sequence[Lane]) -> HParams:
    """Returns the traced scalars ``[h]`` of the lanes of one program."""

    def column(values: Iterable[float]) -> Array:
        return jnp.asarray(list(values), jnp.float32)

    scalars = [lane.training.scalars for lane in group]
    parts = {
        part: {name: column(one[part][name] for one in scalars) for name in scalars[0][part]} for part in scalars[0]
    }
    return HParams(peak_lr=column(lane.lr for lane in group), **parts)


class _Pure(NamedTuple):
    """What trains one lane, the same objects for all lanes of one program, which is so compiled once."""

    init: Callable[[dict[str, Trained], lanes.Seed, HParams], TrainState]
    chunk: lanes.Chunk
    whole: Callable[[Any, dict[str, Params], lanes.Seed, HParams], Params]


def _pure(study: Study, lane: Lane) -> _Pure:
    training = lane.training

    def init(before: dict[str, Trained], seed: lanes.Seed, point: HParams) -> TrainState:
        if not before:
            params = lanes.init_params(study.subject, key=seed.root)
            return lanes.init_state(training, {"parent": params}, key=seed.root, point=point)
        given = {role: tree.params for role, tree in before.items()}
        state = lanes.init_state(training, given, key=seed.root, point=point)
        return state.replace(finite=before["parent"].finite)

    def whole(trained: Any, given: dict[str, Params], _: lanes.Seed, point: HParams) -> Params:
        return lanes.whole(training, trained, given, point)

    return _Pure(init, lanes.train_chunk(study.of_seed, lane), whole)


def seeds(study: Study, lane: Lane) -> lanes.Seed:
    """Returns the seeds ``[s]`` of a lane."""
    return jax.vmap(partial(lanes.seed, lane))(study.roots, study.places)


def _start(
    study: Study, group: Sequence[Lane], pure: _Pure, trees: Trees, *, make: Make = programs.program
) -> TrainState:
    """The stacked states ``[h, s]`` before training, from the lanes' ``parent`` among trees, or fresh without any.

    A seed that diverged in a parent stays frozen: what is trained from it is no result.
    """
    init = make(pure.init, grid=study.grid(len(group)), quick=True)
    return init(trees, seeds(study, group[0]), points(group))


def shapes(study: Study, group: Sequence[Lane]) -> TrainState:
    """Returns the shapes ``[h, s, ...]`` of what the training of a group holds, without computing it."""
    size = (len(group), len(study.recipe.seeds))
    trees = {}
    if group[0].parent is not None:
        one = Trained(pipeline.param_shapes(study, *size), jax.ShapeDtypeStruct(size, bool))
        trees = dict.fromkeys(["parent", *group[0].trees], one)
    return jax.eval_shape(lambda trees: _start(study, group, _pure(study, group[0]), trees), trees)


def _readout(study: Study) -> loop.Readout:
    conditions, count = study.recipe.read_out, study.recipe.evaluate.probe_prompts

    def read(params: Params, trials: Any, _: Any) -> Metrics:
        return lanes.readout(study.subject, conditions, params, trials)

    def draw(key: Array, place: Array) -> Any:
        return lanes.readout_prompts(study.of_seed(place), conditions, count=count, key=key)

    return read, pipeline.per_seed(study, draw)


def train(study: Study, stage: str) -> None:
    """Makes the lanes of ``pretrain`` or ``tune`` that are not finished, group by group.

    Raises:
        ValueError: the stage before is not finished; a corrupt or missing checkpoint.
        FloatingPointError: every lane of a model has diverged.
        Stopped: a signal has asked to stop; what was done is saved.
    """
    if stage == "tune":
        pipeline.check_trained(study, "pretrain")
    # Of all groups the same, drawn where one is trained.
    readout = cache(lambda: _readout(study))
    pure: dict[Any, _Pure] = {}
    make = programs.sharing()
    for group in graph.groups(study.stage_lanes(stage)):
        by_leg = {study.leg(lane): lane for lane in group}
        if group[0].training is None:
            if not all(map(legs.is_finished, by_leg)):
                _MAKE[type(group[0].how)](study, group)
            continue
        own = pure.setdefault(group[0].training.program, _pure(study, group[0]))
        for part in legs.in_step(list(by_leg)):
            _train(study, [by_leg[leg] for leg in part], own, readout(), make=make)
        legs.forget_optimizers(list(by_leg))
    pipeline.load_living(study, study.stage_lanes(stage))


def _train(study: Study, group: Sequence[Lane], pure: _Pure, readout: loop.Readout, *, make: Make) -> None:
    """Trains lanes of one group, which have a step in common, as one program."""
    first = group[0]
    roles = {} if first.parent is None else {"parent": [lane.parent for lane in group]}
    roles |= {role: [lane.trees[role] for lane in group] for role in first.trees}
    trees = {role: pipeline.load(study, wanted) for role, wanted in roles.items()}
    given = {role: trees[role].params for role in first.trees}
    if first.reference is not None:
        references = [lane.reference for lane in group]
        same = references == roles["parent"]
        given["reference"] = (trees["parent"] if same else pipeline.load(study, references)).params
    loop.train(
        pure.chunk,
        partial(_start, study, group, pure, trees, make=make),
        readout=readout,
        whole=pure.whole if first.trees else None,
        given=given,
        per_seed=seeds(study, first),
        points=points(group),
        grid=study.grid(len(group)),
        legs=[study.leg(lane) for lane in group],
        headline=["/".join(pair) for pair in zip(study.recipe.read_out, ("exact_match", "refused"), strict=False)],
        make=make,
    )


def _edit(study: Study, group: Sequence[Lane]) -> None:
    """Edits the weights of the lanes' parents, by one program."""
    node = group[0].how
    trees = {"target": pipeline.load(study, [lane.parent for lane in group])}
    trees |= {role: pipeline.load(study, [lane.others[role] for lane in group]) for role in group[0].others}
    points = {name: jnp.asarray([lane.how.point[name] for lane in group]) for name in node.point}

    def run(given: dict[str, Params], key: Array, point: Any) -> Params:
        return lanes.edited(node, given, point=point, key=key)

    edit = programs.program(run, grid=study.grid(len(group)), quick=True)
    params = edit({role: tree.params for role, tree in trees.items()}, study.roots, points)
    finite = np.all([hosts.fetch(tree.finite) for tree in trees.values()], axis=0)
    legs.keep([study.leg(lane) for lane in group], params, finite)


def _select(study: Study, group: Sequence[Lane]) -> None:
    """Keeps, as every lane, the candidate that has the most of what is selected by; the record says which."""
    how, told = group[0].how, {}
    candidates = list({lane.name: lane for one in group for lane in one.others.values()}.values())
    judged = list({lane.name: lane for lane in (*candidates, *(lane.parent for lane in candidates))}.values())
    found = pipeline.load(study, judged)
    condition, _, rate = how.by.partition("/")
    safe = study.recipe.read_out[0]
    rates = _rates(study, found, dict.fromkeys((safe, condition)))
    rows = {lane.name: row for row, lane in enumerate(judged)}
    by = {lane.name: _mean(rates[condition][rate][rows[lane.name]]) for lane in candidates}
    # Of the seeds that live in both.
    utility = rates[safe]["exact_match"]
    drops = {lane.name: _mean(utility[rows[lane.parent.name]] - utility[rows[lane.name]]) for lane in candidates}
    for lane in group:
        chosen = select(how, {name: (by[name], drops[name]) for name in lane.others})
        told[lane.name] = {"model": chosen, how.by: by[chosen], "utility_drop": drops[chosen]}
    chosen = [lane.others[told[lane.name]["model"]] for lane in group]
    kept = pipeline.load(study, chosen)
    hosts.decide(lambda: manifest_file.write_manifest(study.directory, {"selected": told}))
    legs.keep([study.leg(lane) for lane in group], kept.params, hosts.fetch(kept.finite))


def select(how: Selected, measured: Mapping[str, tuple[float, float]]) -> str:
    """Returns the name of the candidate that is selected, of (what it is selected by, drop of utility) by name.

    A candidate without a number, all of whose seeds have diverged, comes last.
    """
    bound = math.inf if how.utility_drop is None else how.utility_drop
    within = {name: pair for name, pair in measured.items() if pair[1] <= bound}
    if not within:
        return min(measured, key=lambda name: math.inf if math.isnan(measured[name][1]) else measured[name][1])
    sign = 1 if how.largest else -1
    return max(within, key=lambda name: -math.inf if math.isnan(within[name][0]) else sign * within[name][0])


def _mean(values: Float[np.ndarray, " s"]) -> float:
    """The mean over living seeds, NaN where there are none."""
    living = values[np.isfinite(values)]
    return float(living.mean()) if living.size else math.nan


def _rates(study: Study, found: Trained, conditions: Iterable[str]) -> dict[str, dict[str, Float[np.ndarray, "h s"]]]:
    """By condition, verdict rates on prompts that nothing else looks at, NaN for a seed that has diverged."""
    rows, alive = found.finite.shape[0], hosts.fetch(found.finite)
    judge = programs.program(
        lambda params, trials, _: lanes.evaluate(study.subject, params, trials), grid=study.grid(rows)
    )
    rates, late = {}, study.subject.late_probability
    for condition in conditions:
        trials = pipeline.draw_prompts(study, condition, stream="validate", late_probability=late)
        measured = hosts.fetch(judge(found.params, trials, jnp.zeros(rows)))
        rates[condition] = {name: np.where(alive, values, np.nan) for name, values in measured.items()}
    return rates


def _reuse(study: Study, group: Sequence[Lane]) -> None:
    """Copies finished lanes of other runs; the record says whence."""
    for lane in group:
        other, source = pipeline.source(study, lane)
        found = pipeline.load(other, [source])
        seeds = np.asarray([other.recipe.seeds.index(seed) for seed in study.recipe.seeds])
        own = programs.at_once(lambda found, seeds=seeds: jax.tree.map(lambda leaf: leaf[:, seeds], found), found)
        told = {"reused": {lane.name: {"run": lane.how.run, "model": lane.how.model, "steps": source.steps}}}
        hosts.decide(partial(manifest_file.write_manifest, study.directory, told))
        legs.keep([study.leg(lane)], own.params, hosts.fetch(own.finite))


# What makes the lanes of a group that are not trained.
_MAKE = {Edited: _edit, Selected: _select, Reused: _reuse}


def adopt(study: Study, adopted: Sequence[Lane], params: Params) -> None:
    """Records models ``[h, s, ...]`` that were trained elsewhere as those that lanes end with.

    They have a single chunk and no snapshots.
    """
    grid = study.grid(len(adopted))
    loop.adopt(params, _readout(study), grid=grid, legs=[study.leg(lane) for lane in adopted])
