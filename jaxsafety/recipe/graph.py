"""The models of a study as a graph: every named one, with what it begins with and goes by, as lanes.

A field of a model may list several values, or name them (``lr: {eta_M: 1e-3, eta_S: 1e-4}``), and ``from`` several
models: every combination is a lane of that model. Lanes of one generation that agree in all but traced scalars are made
by one program at once, whatever they begin with, and as many of a later generation by the same program again.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsafety import methods
from jaxsafety.config import fields as fields_
from jaxsafety.config.names import check_name
from jaxsafety.config.told import told_of
from jaxsafety.recipe import products
from jaxsafety.recipe.lane import PARENT, ROOT, Lane
from jaxsafety.recipe.models import TOLD_BY, Edited, Given, How, Reused, Selected, Training, kind_of, trained
from jaxsafety.recipe.nodes import made

# Every lane is read, checked and planned, and has a directory named after its values.
_MOST_LANES = 4096
_MOST_BYTES = 200


def expand(models: Mapping[str, Any]) -> tuple[Lane, ...]:
    """Returns the lanes of a recipe's models, what a model goes by before it, else in the order of the recipe.

    Raises:
        ValueError: no model, a bad name, an unknown parent, models that wait for each other, too many lanes, an unknown
            field or a bad value; the model is named.
    """
    found: dict[str, tuple[Lane, ...]] = {}
    for label in _ordered(models):
        found[label] = _lanes(label, models[label], found)
    return tuple(itertools.chain(*found.values()))


def resolved(given: Mapping[str, Any], lanes: Sequence[Lane], as_dict: Callable[[Any], Any]) -> dict[str, Any]:
    """Returns a model's fields with all defaults, as a recipe writes them; lists of values stay."""
    lane = lanes[0]
    found = as_dict(lane.how)
    if isinstance(lane.how, Reused):
        found = {"from": {name: found.pop(name) for name in ("run", "model", "parent", "generation")}} | found
    elif isinstance(lane.how, Edited):
        found |= {role: given.get(role, ROOT) for role in lane.others}
    elif isinstance(lane.how, Selected) and len(lane.how.select) == 1:
        found["select"] = lane.how.select[0]
    for axis in products.axes(lane.label, given):
        products.restored(found, axis)
    return ({} if "from" in found or "from" not in given else {"from": given["from"]}) | found


def groups(lanes: Sequence[Lane]) -> list[tuple[Lane, ...]]:
    """Groups lanes that one program makes, alike in all but traced scalars; each after what it goes by."""
    found: dict[Any, list[Lane]] = {}
    for lane in lanes:
        program = lane.how.program if isinstance(lane.how, Training | Edited) else lane.label
        found.setdefault((lane.level, lane.generation, type(lane.how).__name__, program), []).append(lane)
    return [tuple(group) for _, group in sorted(found.items(), key=lambda item: item[0][0])]


def twins(one: Lane, other: Lane) -> bool:
    """Whether two lanes differ in nothing but their model: of one parent, at the same point."""
    return one.label != other.label and one.point == other.point and one.parent is other.parent


def _ordered(models: Mapping[str, Any]) -> list[str]:
    """The labels, each after those that it goes by."""
    if not models:
        raise ValueError("models must name at least one model, got none")
    for label, given in models.items():
        if not re.fullmatch(r"[\w+-]{1,64}", label):
            raise ValueError(f"the name of a model must be at most 64 letters, digits and any of _ + -, got {label!r}")
        if label in (PARENT, ROOT):
            raise ValueError(f"{label!r} is no name for a model, as it stands for others: choose another")
        if not isinstance(given, Mapping):
            raise ValueError(f"models.{label} must hold fields such as `method: sft`, got {given!r}")
        _check_told(label, given)
    needed = {label: _needed(label, given, models) for label, given in models.items()}
    left, done = dict.fromkeys(models), {}
    while left:
        ready = next((label for label in left if all(one in done for one in needed[label])), None)
        if ready is None:
            circle = " <- ".join(_circle(needed, next(iter(left)), left))
            raise ValueError(f"models wait for each other: {circle}, expected one that goes by none of the others")
        done[ready] = None
        del left[ready]
    return list(done)


def _check_told(label: str, given: Mapping[str, Any]) -> None:
    """Refuses a model that is said to come about in two ways."""
    # An edit may have a field `method` of its own.
    own = isinstance(given.get("method"), str) and (given["method"] in methods.TABLE or ":" in given["method"])
    told = [name for name in TOLD_BY if name in given and (name != "method" or own)]
    if len(told) > 1:
        raise ValueError(f"models.{label} has {' and '.join(told)}: expected one of them, which says how it is made")


def _circle(needed: Mapping[str, list[str]], label: str, left: Mapping[str, Any]) -> list[str]:
    """The labels of a circle, the first one again at its end."""
    path = [label]
    while path[-1] not in path[:-1]:
        path.append(next(one for one in needed[path[-1]] if one in left))
    return path[path.index(path[-1]) :]


def _needed(label: str, given: Mapping[str, Any], models: Mapping[str, Any]) -> list[str]:
    """The models that a model goes by."""
    parents = _parents(label, given)
    where = f"models.{label}.from" + ".parent" * (kind_of(given) is Reused)
    for parent in parents:
        check_name(f"model in {where}", parent, [name for name in models if name != label or parent == label])
    if kind_of(given) is Selected:
        for one in _candidates(given):
            check_name(f"model in models.{label}.select", one, models)
        return _candidates(given)
    named = [given[role] for role in _roles(given) if role in given]
    # Other names are those of ancestors, or unknown, which is refused where the lane is made.
    return [*parents, *(one for one in named if isinstance(one, str) and one in models)]


def _roles(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The roles of an edit but its target's, which is what a model is from."""
    made_by = products.loaded(Edited, given["edit"]) if kind_of(given) is Edited else None
    return () if made_by is None else tuple(role for role in made_by.roles if role != "target")


def _parents(label: str, given: Mapping[str, Any]) -> list[str]:
    if kind_of(given) is Selected:
        return []
    named = given.get("from", [])
    if kind_of(given) is Reused:
        named = named.get("parent")
        if named is not None and not isinstance(named, str):
            raise ValueError(f"models.{label}.from.parent must be the name of a model, got {named!r}")
        return [] if named is None else [named]
    parents = [named] if isinstance(named, str) else named
    if not isinstance(parents, list | tuple) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"models.{label}.from must be the name of a model, or a list of names, got {named!r}")
    if "from" in given and not parents:
        raise ValueError(f"models.{label}.from must name at least one model, got none")
    if len(set(parents)) < len(parents):
        raise ValueError(f"models.{label}.from must name distinct models, got {list(parents)}")
    return list(parents)


def _lanes(label: str, given: Mapping[str, Any], before: Mapping[str, tuple[Lane, ...]]) -> tuple[Lane, ...]:
    if kind_of(given) is Selected:
        return _selected(label, given, [lane for one in _candidates(given) for lane in before[one]])
    starts = [lane for parent in _parents(label, given) for lane in before[parent]]
    if kind_of(given) is Edited and not starts:
        raise ValueError(f"models.{label} has no `from`: expected the model that is edited")
    axes, found = list(products.axes(label, given)), []
    _check_count(label, max(len(starts), 1) * math.prod(len(axis.values) for axis in axes), before)
    for parent in starts or [None]:
        for combination in itertools.product(*(axis.values.items() for axis in axes)):
            words = {"from": f"from={parent.name}"} if parent and len(starts) > 1 else {}
            content = dict(given)
            for axis, (word, value) in zip(axes, combination, strict=True):
                words[".".join(axis.path)] = word
                content = products.at(content, axis, value)
            found.append(_lane(label, words, parent, content, before))
    names = Counter(lane.name for lane in found)
    if twice := next((name for name, count in names.items() if count > 1), None):
        raise ValueError(f"models.{label} has two lanes called {twice}: give its values other names")
    return tuple(found)


def _check_count(label: str, count: int, before: Mapping[str, tuple[Lane, ...]]) -> None:
    """Refuses a model of more lanes than are planned, before they are made."""
    if count > _MOST_LANES:
        raise ValueError(f"models.{label} must have at most {_MOST_LANES} lanes, got {count}: give it fewer values")
    if (count := sum(map(len, before.values())) + count) > _MOST_LANES:
        raise ValueError(
            f"models must have at most {_MOST_LANES} lanes in all, got {count} up to {label}: give it fewer values, or "
            "split the recipe"
        )


def _lane(
    label: str, words: Mapping[str, str], parent: Lane | None, content: dict[str, Any],
    before: Mapping[str, tuple[Lane, ...]],
) -> Lane:  # fmt: skip
    """One lane, of single values."""
    owner, others = f"models.{label}", {}
    if kind_of(content) is Given:
        how: How = fields_.build(Given, {name: content[name] for name in content if name != "from"}, owner=owner)
    elif kind_of(content) is Reused:
        plain = content.pop("from") | content
        how = fields_.build(Reused, plain, owner=owner if content else f"{owner}.from")
    else:
        roles = _roles(content)
        plain = {name: value for name, value in content.items() if name != "from" and name not in roles}
        how = made(Edited, plain, owner=owner) if kind_of(content) is Edited else trained(plain, owner=owner)
        for role in roles:
            others[role] = _other(label, role, content.get(role, ROOT if role == "base" else None), parent, before)
    lane = Lane(label, words, parent, how, others)
    _check(lane)
    return lane


def _other(label: str, role: str, name: Any, target: Lane | None, before: Mapping[str, tuple[Lane, ...]]) -> Lane:
    """The lane that a name stands for in a role of an edit of ``target``."""
    where = f"models.{label}.{role}"
    if name is None or target is None:
        raise ValueError(f"{where} is not given: expected the name of a model")
    if name in (ROOT, PARENT):
        # Of the target: its parent is what its own update is from.
        return target.root if name == ROOT else target.parent or target
    for lane in (target, *target.ancestors):
        if lane.label == name:
            return lane
    check_name(f"model in {where}", name, [*before, ROOT, PARENT])
    lanes = before[name]
    chosen = [lane for lane in lanes if twins(lane, target)] or list(lanes)
    if len(chosen) > 1:
        raise ValueError(
            f"{where}: {name} is no ancestor of {target.name} and has {len(lanes)} lanes, of which none has its parent "
            f"and its point: expected a model with one lane"
        )
    return chosen[0]


def _candidates(given: Mapping[str, Any]) -> list[Any]:
    """The models whose lanes a selection is of."""
    named = given["select"]
    return list(named) if isinstance(named, list | tuple) else [named]


def _selected(label: str, given: Mapping[str, Any], candidates: Sequence[Lane]) -> tuple[Lane, ...]:
    """A lane for every set of candidates that agree in what they are selected per."""
    how = fields_.build(Selected, {**given, "select": _candidates(given)}, owner=f"models.{label}")
    words = list(dict.fromkeys(name for lane in candidates for name in lane.words))
    # A model from one other does not say so in its name.
    parted = len({lane.parent for lane in candidates}) > 1
    sets: dict[tuple[str, ...], list[Lane]] = {}
    for lane in candidates:
        for name in how.per:
            if name not in words and name != "from":
                check_name(f"field in models.{label}.per", name, ["from", *words])
        own = lane.words | {"from": f"from={lane.parent.name}" if parted and lane.parent else ""}
        sets.setdefault(tuple(own.get(name, "") for name in how.per), []).append(lane)
    found = []
    for key, some in sets.items():
        shared = [one for one in some[0].ancestors if all(one in lane.ancestors for lane in some)]
        if not shared:
            told = " and ".join(dict.fromkeys((some[0].name, some[-1].name)))
            raise ValueError(
                f"models.{label}.select: got {told}, expected models that all begin with another one, the same"
            )
        others = {lane.name: lane for lane in some}
        found.append(Lane(label, dict(zip(how.per, key, strict=True)), shared[0], how, others))
        _check(found[-1])
    return tuple(found)


def _check(lane: Lane) -> None:
    if (size := len(lane.name.encode())) > _MOST_BYTES:
        raise ValueError(
            f"a lane is a directory named after its values, of at most {_MOST_BYTES} bytes, got {size}: "
            f"give values names, or make fewer lists ({lane.name[:40]}...)"
        )
    if isinstance(lane.how, Edited):
        _check_updates(lane)
    if lane.training is None:
        return
    if lane.parent is None and lane.training.asks_reference:
        raise ValueError(
            f"models.{lane.label} has no `from`, and method {lane.training.method!r} asks the model that training "
            "begins with"
        )
    if not lane.training.asks_reference and lane.training.reference != PARENT:
        raise ValueError(
            f"models.{lane.label}.reference: got {lane.training.reference!r}, expected none, as method "
            f"{lane.training.method!r} compares with nothing"
        )
    if lane.parent is None and lane.training.parametrisation.kind != "full":
        raise ValueError(f"models.{lane.label} has no `from`: expected a model of which a part is trained")
    if lane.parent is not None:
        with told_of(f"models.{lane.label}.reference"):
            lane.ancestor(lane.training.reference)
        if any(tree is lane.parent for role, tree in lane.trees.items() if role != "parent"):
            raise ValueError(
                f"models.{lane.label}.parametrisation: {lane.parent.name}, which it is from, has no update from "
                "itself: expected another ancestor"
            )


def _check_updates(lane: Lane) -> None:
    """Refuses an edit by an update that is zero: of a model that it goes by, or of the edited one where it is one."""
    base, edit = lane.others.get("base"), lane.how.load()
    others = {role: other for role, other in lane.others.items() if role != "base"}
    if (not others or edit.merges) and base is lane.parent:
        raise ValueError(
            f"models.{lane.label}.base: {base.name}, which is edited, has no update from itself: expected one of its "
            "ancestors"
        )
    for role, other in others.items():
        if other is base:
            raise ValueError(
                f"models.{lane.label}.{role}: {base.name}, which is the base, too, has no update from itself: expected "
                "another model"
            )


def default_models() -> dict[str, Any]:
    """The paper's study: one pretraining, and its three methods at two learning rates."""
    tuned = {"from": "pretrained", "lr": {"eta_M": 1e-3, "eta_S": 1e-4}, "snapshots": 4, "role": "defence"}
    return {"pretrained": {"method": "pretrain", "steps": 400}} | {
        method: {"method": method} | tuned for method in ("sft", "dpo", "unlearn")
    }
