"""The models of a recipe: lanes of every combination, ancestors, what trains together, bad graphs in a sentence."""

import pytest

from jaxsafety.recipe import graph

PRETRAINED = {"method": "pretrain", "data": {"pool": "text"}}


def expand(**models):
    return graph.expand({"pretrained": PRETRAINED, **models})


def by_name(lanes):
    return {lane.name: lane for lane in lanes}


def sft(*parents, **fields):
    return {"from": parents[0] if len(parents) == 1 else list(parents), "method": "sft", **fields}


def test_every_combination_of_values_and_parents_is_a_lane():
    lanes = expand(
        explicit=sft("sft", "dpo", data={"pool": "explicit", "prompts": [10, 100]}, steps=40, lr=[1e-4, 3e-4]),
        sft=sft("pretrained", lr={"eta_M": 2e-3, "eta_S": "2e-4"}),
        dpo={"from": "pretrained", "method": "dpo", "weight_chosen": [0.1, 1]},
    )
    assert [lane.name for lane in lanes[:5]] == [
        "pretrained", "sft.eta_M", "sft.eta_S", "dpo.weight_chosen=0.1", "dpo.weight_chosen=1.0",
    ]  # fmt: skip
    assert len(lanes) == 5 + 4 * 2 * 2
    found = by_name(lanes)
    one = found["explicit.from=sft.eta_S.lr=0.0003.prompts=100"]
    assert one.parent is found["sft.eta_S"] and one.root is found["pretrained"]
    assert (one.training.data.prompts, one.training.lr, one.training.steps) == (100, 3e-4, 40)
    assert found["sft.eta_S"].training.lr == 2e-4
    assert found["dpo.weight_chosen=1.0"].training.options.weight_chosen == 1.0
    assert [lane.name for lane in one.ancestors] == ["sft.eta_S", "pretrained"]


def test_a_lane_has_one_name_however_its_model_is_written():
    written = {"lr": ["1e-3", 1e-4], "steps": [10, 20], "data": {"p_unsafe": [0.5, 1], "pool": "safety"}}
    names = {
        tuple(
            lane.name
            for lane in expand(a={name: ({"from": "pretrained", "method": "sft"} | written)[name] for name in order})
        )
        for order in (("from", "method", *written), (*reversed(list(written)), "method", "from"))
    }
    assert len(names) == 1 and "a.steps=10.lr=0.001.p_unsafe=1.0" in next(iter(names))


def test_a_single_value_or_parent_has_no_name():
    assert [lane.name for lane in expand(a=sft("pretrained", lr=1e-3), b=sft("a"))] == ["pretrained", "a", "b"]


def test_values_of_sections_and_static_fields_are_lanes_too():
    lanes = expand(a=sft("pretrained", steps=[10, 20], optim={"warmup": [0.1, 0.2]}, data={"mix": ["prompt", "batch"]}))
    assert len(lanes) == 9
    last = lanes[-1]
    assert last.point == "steps=20.mix=batch.warmup=0.2"
    assert (last.training.steps, last.training.optim.warmup, last.training.data.options.mix) == (20, 0.2, "batch")


def test_references_are_ancestors():
    dpo = {"from": "defended", "method": "dpo"}
    lanes = by_name(
        expand(
            defended=sft("pretrained"),
            near=dpo,
            far=dpo | {"reference": "root"},
            named=dpo | {"reference": "pretrained"},
            deep={"from": "near", "method": "dpo", "reference": "defended"},
        )
    )
    assert lanes["near"].reference is lanes["defended"]
    assert lanes["far"].reference is lanes["named"].reference is lanes["pretrained"]
    assert lanes["deep"].reference is lanes["defended"]
    assert lanes["defended"].reference is None


def test_lanes_alike_in_all_but_traced_scalars_train_as_one_program():
    dpo = {"from": "pretrained", "method": "dpo"}
    lanes = expand(
        a=dpo | {"weight_chosen": [0.1, 0.2], "lr": [1e-3, 1e-4]},
        b=dpo | {"data": {"p_unsafe": [0.2, 0.8]}},
        c=dpo | {"reduction": "mean"},
        d=sft("pretrained"),
        e=sft("pretrained", steps=100),
        f=sft("a", "d", data={"pool": "explicit", "prompts": [5, 10]}),
        g=sft("d", data={"pool": "explicit"}),
    )
    named = [[lane.label for lane in group] for group in graph.groups(lanes)]
    assert named == [["pretrained"], [*"aaaa", *"bb"], ["c"], ["d"], ["e"], ["f"] * 10, ["g"]]


def test_twins_differ_in_nothing_but_their_method():
    rates = {"lr": {"eta_M": 1e-3, "eta_S": 1e-4}}
    lanes = by_name(expand(a=sft("pretrained", **rates), b=sft("pretrained", **rates), c=sft("a", **rates)))
    assert graph.twins(lanes["a.eta_M"], lanes["b.eta_M"])
    assert not graph.twins(lanes["a.eta_M"], lanes["b.eta_S"])
    assert not graph.twins(lanes["a.eta_M"], lanes["a.eta_M"])
    assert not graph.twins(lanes["b.eta_M"], lanes["c.from=a.eta_M.eta_M"])


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "models must name at least one model, got none"),
        ({"a/b": PRETRAINED}, "the name of a model must be at most 64 letters, digits and any of _ + -, got 'a/b'"),
        ({"a.b": PRETRAINED}, "the name of a model must be at most 64 letters, digits and any of _ + -, got 'a.b'"),
        ({"root": PRETRAINED}, "'root' is no name for a model, as it stands for others: choose another"),
        ({"a": sft("b"), "b": sft("c"), "c": sft("a")}, "models wait for each other: a <- b <- c <- a"),
        ({"a": sft("a")}, "models wait for each other: a <- a"),
        ({"p": PRETRAINED, "a": sft("q")}, "unknown model in models.a.from 'q': expected one of p"),
        ({"p": PRETRAINED, "a": sft("p", "p")}, "models.a.from must name distinct models, got ['p', 'p']"),
        ({"p": PRETRAINED, "a": {"from": []}}, "models.a.from must name at least one model, got none"),
        ({"p": PRETRAINED, "a": {"from": 3}}, "models.a.from must be the name of a model, or a list of names, got 3"),
        ({"a": {"method": "dpo"}}, "models.a has no `from`, and method 'dpo' asks the model that training begins with"),
        (
            {"p": PRETRAINED, "a": sft("p", reference="b") | {"method": "dpo"}, "b": sft("p")},
            "models.a.reference: unknown ancestor of a 'b': expected one of p, parent, root",
        ),
        (
            {"p": PRETRAINED | {"reference": "root"}},
            "models.p.reference: got 'root', expected none, as method 'pretrain' compares with nothing",
        ),
        (
            {"p": PRETRAINED, "a": sft("p", reference="root") | {"method": "graddiff"}},
            "models.a.reference: got 'root', expected none, as method 'graddiff' compares with nothing",
        ),
        (
            {"p": PRETRAINED, "a": {"from": "p", "method": "sft", "edit": "scaled"}},
            "models.a has method and edit: expected one of them, which says how it is made",
        ),
        ({"p": PRETRAINED, "a": {"frm": "p", "method": "sft"}}, "models.a has no field 'frm'; did you mean 'from'?"),
        ({"a": {"edit": "scaled"}}, "models.a has no `from`: expected the model that is edited"),
        ({"p": PRETRAINED, "a": {"from": "p", "edit": "scled"}}, "models.a: unknown edit 'scled'"),
        (
            {"p": PRETRAINED, "a": sft("p"), "b": {"from": "a", "edit": "transferred"}},
            "models.b.other is not given: expected the name of a model",
        ),
        (
            {"p": PRETRAINED, "a": sft("p"), "b": {"from": "a", "edit": "scaled", "base": "q"}},
            "unknown model in models.b.base 'q': expected one of p, a, root, parent",
        ),
        (
            {"p": PRETRAINED, "a": sft("p"), "c": sft("p", lr=[1, 2]),
             "b": {"from": "a", "edit": "transferred", "other": "c", "alpha": 1}},
            "models.b.other: c is no ancestor of a and has 2 lanes, of which none has its parent and its point: exp",
        ),
        (
            {"p": PRETRAINED, "a": sft("p", parametrisation={"kind": "mask"})},
            "models.a.parametrisation: p, which it is from, has no update from itself: expected another ancestor",
        ),
        (
            {"p": PRETRAINED | {"parametrisation": {"kind": "lora"}}},
            "models.p has no `from`: expected a model of which a part is trained",
        ),
        (
            {"p": PRETRAINED, "a": sft("p", parametrisation={"kind": "lora", "rnk": 3})},
            "models.a.parametrisation has no field 'rnk': it has rank, alpha, targets; did you mean 'rank'?",
        ),
        (
            {"p": PRETRAINED, "a": sft("p", steps={"c": 2, "c.a": 4}, lr={"b": 1e-3, "a.b": 1e-4})},
            "models.a has two lanes called a.c.a.b: give its values other names",
        ),
        (
            {"p": PRETRAINED, "a": {"from": "p", "edit": "scaled", "alpha": 0.5}},
            "models.a.base: p, which is edited, has no update from itself: expected one of its ancestors",
        ),
        (
            {"p": PRETRAINED, "a": sft("p"), "b": {"from": "a", "edit": "hdr", "base": "p"}},
            "models.b.harmful is not given: expected the name of a model",
        ),
        (
            {"p": PRETRAINED, "a": sft("p"), "h": sft("a"), "b": {"from": "a", "edit": "hdr", "harmful": "p"}},
            "models.b.harmful: p, which is the base, too, has no update from itself: expected another model",
        ),
        (
            {"p": PRETRAINED, "a": sft("p"), "b": {"from": "a", "edit": "ties", "other": "parent", "base": "p"}},
            "models.b.other: p, which is the base, too, has no update from itself: expected another model",
        ),
        (
            {"p": PRETRAINED, "a": sft("p"), "c": sft("a"),
             "b": {"from": "a", "edit": "ties", "other": "c", "base": "a"}},
            "models.b.base: a, which is edited, has no update from itself: expected one of its ancestors",
        ),
        (
            {"p": PRETRAINED, "a": sft("p", data={"prompts": 3, "mix": "batch"})},
            "models.a.data: mix: got 'batch', expected 'prompt' where there is a number of prompts",
        ),
        (
            {"p": PRETRAINED | {"data": {"prompts": 3}}},
            "models.p.data: prompts: got 3, expected none of a pool of text, which changes with",
        ),
        ({"p": PRETRAINED | {"learning_rate": 1}}, "models.p has no field 'learning_rate': it is called 'lr'"),
        ({"p": PRETRAINED, "a": sft("p", data="explicit")}, "models.a.data must hold fields such as `pool: safety`, g"),
        ({"p": PRETRAINED, "a": {"select": "b"}}, "unknown model in models.a.select 'b': expected one of p, a"),
        ({"p": PRETRAINED, "a": {"select": "p"}}, "models.a.select: got p, expected models that all beg"),
        ({"p": PRETRAINED, "a": {"select": []}}, "models.a: select: got [], expected the names of distinct models"),
        (
            {"p": PRETRAINED, "b": sft("p"), "a": {"select": ["b", "b"]}},
            "models.a: select: got ['b', 'b'], expected the names of distinct models",
        ),
        ({"p": PRETRAINED, "b": sft("p"), "a": {"select": ["b", "c"]}}, "unknown model in models.a.select 'c'"),
        (
            {"p": PRETRAINED, "a": sft("p"), "b": {"select": "a", "per": ["lr"]}},
            "unknown field in models.b.per 'lr': expected one of from",
        ),
        (
            {"p": PRETRAINED, "b": {"select": "p", "from": "p"}},
            "models.b has no field 'from': it has select, per, by, largest, utility_drop, role",
        ),
        ({"p": {"from": {"run": "runs/x"}}}, "models.p.from has no model, which has no default: give it one"),
        ({"p": {"from": {"run": "x", "model": "y"}, "method": "sft"}}, "models.p has no field 'method': it has run, "),
        ({"p": PRETRAINED | {"lr": []}}, "models.p.lr must have at least one value, got none"),
        ({"p": PRETRAINED | {"lr": [1e-3, 1e-3]}}, "models.p.lr must have distinct values, got [0.001, 0.001]"),
        ({"p": PRETRAINED | {"lr": {"a/b": 1}}}, "models.p.lr: a value's name must be letters, digits and any of _ ."),
        ({"p": PRETRAINED | {"steps": list(range(1, 5000))}}, "models.p must have at most 4096 lanes, got 4999: giv"),
        (
            {"p": PRETRAINED | {"lr": [i + 1 for i in range(60)]}, "a": sft("p", steps=list(range(1, 80)))},
            "models.a must have at most 4096 lanes",
        ),
        (
            {"p": PRETRAINED} | {f"m{i}": sft("p", steps=list(range(1, 3000))) for i in range(2)},
            "models must have at most 4096 lanes in all, got 5999 up to m1: give it fewer values, or split the recipe",
        ),
        (
            {"p": PRETRAINED | {"lr": {"x" * 60: 1, "y": 2}, "steps": {"x" * 60: 1, "y": 2},
                                "batch_size": {"x" * 60: 1, "y": 2}, "chunk_steps": {"x" * 60: 1, "y": 2}}},
            "a lane is a directory named after its values, of at most 200 bytes, got 245",
        ),
    ],
)  # fmt: skip
def test_a_bad_graph_is_one_sentence(models, message):
    with pytest.raises(ValueError) as caught:
        graph.expand(models)
    assert str(caught.value).startswith(message)


def test_a_selection_of_several_models_has_a_lane_for_each_that_they_are_from():
    models = {"p": PRETRAINED, "sft": sft("p"), "dpo": sft("p"), "few": sft("sft", "dpo"), "many": sft("sft"),
              "worst": {"select": ["few", "many"]}}  # fmt: skip
    found = {lane.name: lane for lane in graph.expand(models) if lane.label == "worst"}
    assert {name: list(lane.others) for name, lane in found.items()} == {
        "worst.from=sft": ["few.from=sft", "many"], "worst.from=dpo": ["few.from=dpo"]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "harmful", "base"),
    [
        ({"harmful": "explicit"}, "explicit.from=dpo", "p"),
        ({"harmful": "explicit", "base": "parent"}, "explicit.from=dpo", "dpo"),
        # What is healed may be what harm is told from, or be the harmful one itself.
        ({"harmful": "explicit", "base": "task"}, "explicit.from=dpo", "task.from=dpo"),
        ({"harmful": "task", "base": "parent"}, "task.from=dpo", "dpo"),
        ({"harmful": "alone"}, "alone", "p"),
    ],
)
def test_harm_is_told_from_any_model_to_any_other(fields, harmful, base):
    models = {"p": PRETRAINED, "sft": sft("p"), "dpo": sft("p"), "alone": sft("p"), "task": sft("sft", "dpo"),
              "explicit": sft("sft", "dpo"), "healed": {"from": "task", "edit": "hdr"} | fields}  # fmt: skip
    lane = graph.expand(models)[-1]
    assert lane.parent.name == "task.from=dpo"
    assert {role: other.name for role, other in lane.others.items()} == {"harmful": harmful, "base": base}


def test_the_default_study_is_the_papers():
    lanes = graph.expand(graph.default_models())
    assert [lane.name for lane in lanes] == [
        "pretrained", *(f"{method}.{rate}" for method in ("sft", "dpo", "unlearn") for rate in ("eta_M", "eta_S"))
    ]  # fmt: skip
    assert {lane.training.role for lane in lanes[1:]} == {"defence"}
