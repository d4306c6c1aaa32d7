"""The vocabulary of the framework: records, callable contracts and THE axis legend.

Axis legend, the same letters in docstrings, einsum, einops and array annotations:

    s seeds   h hyper-parameter points   l layers   b batch   t tokens   v vocabulary   d model width
    f MLP width   n heads   g key/value heads   k head width   r rank   w window (letters)   m n generic matrix sides
    p q places asked for

Weights are stored ``[in, out]`` (``x @ w``); PyTorch and the paper store ``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
from jaxtyping import Array, Float, Int

# A tree of arrays: of the models here nested dicts, of other libraries whatever they keep parameters in.
Params = Any

# A record's field: an array of the documented shape, or what stands for one (a tracer, jax.eval_shape's struct).
Leaf = Any
Metrics = dict[str, Array]

# Embeddings (no positions added) to logits, parameters bound: what soft tokens and sensitivities differentiate.
ForwardEmbeddings = Callable[[Float[Array, "b t d"]], Float[Array, "b t v"]]
# A sum over examples or tokens, and how many there are.
SumCount = tuple[Array, Array]
Terms = dict[str, SumCount]


@flax.struct.dataclass
class Batch:
    """Sequences prepared for next-token prediction.

    Attributes:
        tokens: ``[b, t]`` int32, model inputs.
        targets: ``[b, t]`` int32, the token that follows each input.
        mask: ``[b, t]`` bool, the positions whose target is scored.
        stem: so many first places are the same in every answer to the prompt, and none of them is scored: a model reads
            them once. Who changes a prompt of a drawn batch, or scores more of it, sets it to 0 on all sides: what is
            scored within a stem has no log-probability (NaN), and counts as wrong.
    """

    tokens: Leaf
    targets: Leaf
    mask: Leaf
    stem: int = flax.struct.field(pytree_node=False, default=0)


@flax.struct.dataclass
class PreferenceBatch:
    """Two answers to the same prompts: row i of either side answers prompt i.

    Attributes:
        chosen: the preferred answers.
        rejected: the dispreferred ones; None where a method asks for none and there are none.
        unsafe: ``[b]`` bool, whether the prompt is one that should be refused.
        reference: what an ancestor of the model says of them, see :class:`Method`; None where nothing is asked.
        aligned: whether both answers have one form, in which every token stands in the place of the other's, as in a
            block of the world: who turns from one to the other goes on with what stands there, not from its beginning.
    """

    chosen: Batch
    rejected: Batch | None
    unsafe: Leaf
    reference: Any = None
    aligned: bool = flax.struct.field(pytree_node=False, default=False)


# What a method learns from: a Batch, a PreferenceBatch, or what the pools of somebody's subject have; see Method.
Examples = Any


@flax.struct.dataclass
class HParams:
    """Traced scalars of one run: a grid point is an array of each, so a grid of them is one compiled program.

    Attributes:
        peak_lr: peak of the learning-rate schedule, > 0.
        options: the traced fields of the method's ``Config``, by name.
        data: those of the pool's ``Config``, and ``prompts``, how many different examples there are, where not endless.
        parts: those of the parametrisation's ``Config``.
    """

    peak_lr: Leaf
    options: dict[str, Leaf] = flax.struct.field(default_factory=dict)
    data: dict[str, Leaf] = flax.struct.field(default_factory=dict)
    parts: dict[str, Leaf] = flax.struct.field(default_factory=dict)


@flax.struct.dataclass
class TrainState:
    """Everything a training run carries: arrays only, no key (the data position *is* ``step``).

    Attributes:
        step: int32, optimiser steps taken.
        params: the parameter tree.
        opt_state: optax state.
        aux: what the method carries beside it, see :class:`Method`; empty for most.
        finite: bool, False once a loss or gradient was not finite; the lane is frozen from then on.
    """

    step: Leaf
    params: Params
    opt_state: Any
    finite: Leaf
    aux: Any = flax.struct.field(default_factory=dict)


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Key = jax.Array

# The site where a layer hands the residual stream to the next.
RESIDUAL = "hook_resid_post"
# (site, layer, positions [b, t], h [b, t, d]) to what flows on in the place of h; see Model.
Hook = Callable[[str, Int[Array, ""], Int[Array, "b t"], Float[Array, "b t d"]], Float[Array, "b t d"]]


class Output(NamedTuple):
    """What a model says of its inputs.

    Attributes:
        logits: ``[b, t, v]`` float32 in nats, up to a constant per position; ``[b, p, v]`` where places were asked for.
        activations: by site, ``[l, b, t, d]`` float32 (``f`` inside the MLP), ``l`` over the layers asked for, ``q`` in
            the place of ``t`` where positions were asked for.
    """

    logits: Leaf
    activations: dict[str, Leaf]


class Decoder(NamedTuple):
    """How a model reads one token after another; what it keeps in between is its own.

    Attributes:
        begin: ``(params, tokens[b, t], *, mask[b, t], room, edit=None) -> (logits[b, v], state)`` after the last real
            token of every prompt. Padding may stand anywhere. ``room`` is the number of tokens to come.
        extend: ``(params, token[b], *, state, edit=None) -> (logits[b, v], state)`` after one more token of every row;
            NaN for a row that has no place left.
    """

    begin: Callable[..., tuple[Leaf, Any]]
    extend: Callable[..., tuple[Leaf, Any]]


class Model(NamedTuple):
    """All that a method, an attack or an analysis may ask of a causal model; parameters are always an argument.

    ``apply(params, inputs, *, mask=None, at=None, sites=(), layers=None, positions=None, edit=None) -> Output``:

    - ``inputs``: integer tokens ``[b, t]``, or float embeddings ``[b, t, d]`` as ``embed`` returns them.
    - ``mask``: ``[b, t]`` bool, True where a token is real; None is no padding. No real token attends to padding, and
      positions count the real ones.
    - ``at``: ``[b, p]`` indices into ``t``, whose logits alone are computed: the unembedding is most of the cost. NaN
      where out of range. None is every place.
    - ``sites``: names of the activations to return; nothing else is stored. ``layers``: ascending indices, None is all.
      ``positions``: ``[b, q]`` indices into ``t`` (padding counts), None is every one; NaN where out of range.
    - ``edit``: a :data:`Hook`, called once per layer at every site that the model has, in the order of the computation,
      whichever are returned; ``layer`` is a traced int32. What it returns, of the shape and type of ``h``, takes the
      place of ``h`` in the computation and in what is returned. ``positions`` are those of the real tokens, not of
      places. While text is written the hook meets a few positions at a time: it should not mix them.

    ``embed(params, tokens[b, t]) -> [b, t, d]`` float32, before any position is added. ``decoder``: see
    :class:`Decoder`. ``branches(params, stems[b, s], rest[n, u]) -> logits[n, u, v]`` of the ends of texts, row i of
    them behind row ``i % b`` of the stems: what ``apply`` says of the whole texts, for less; None for a model that has
    no such thing. Who puts another ``apply`` in its place does so with ``branches``, or has None there. Non-finite
    parameters or inputs give non-finite values, never an error.

    Raises:
        Unsupported: the model lacks what is asked for.
        ValueError: inputs of another shape or type, or longer than the model takes; an unknown site, layers that are
            not ascending indices; an edit that changes a shape or type. A GPT and a Llama refuse (unless traced) real
            tokens outside of the vocabulary and places outside of the sequence, too.
    """

    embed: Callable[..., Leaf]
    apply: Callable[..., Output]
    decoder: Decoder
    branches: Callable[..., Leaf] | None = None


class Needs(NamedTuple):
    """What a method asks for beside the model.

    Attributes:
        rejected: whether examples must have a dispreferred answer; without, only ``batch.chosen`` may be read.
        trained: regular expression of the parameter paths that are trained; the others stay, bit for bit.
        layers: ``(depth) -> indices`` of the layers that are trained where a parameter has some; None is all.
        divisible: whether a batch may be taken in parts, whose sums add up; False for one with a loop inside its step.
        unsafe: whether what it is for is learned from unsafe prompts, so that a file must label some as that.
        reference: whether these options ask anything of its reference, if it has one.
    """

    rejected: bool = True
    trained: str = ".*"
    layers: Callable[[int], Sequence[int]] | None = None
    divisible: bool = True
    unsafe: bool = False
    reference: bool = True


class Method(NamedTuple):
    """A training method: all that the study and the tuning of checkpoints know of it.

    The loss is the sum of its terms, each a sum over examples or tokens divided by its count *of the whole batch*: a
    batch taken in parts, or by several devices, has the loss and the gradient of the whole.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`.
        totals: ``(model, params, batch, config, aux, *, key, progress) -> (terms, metrics)``, both name to (sum,
            count); counts follow from masks, not from what the model says. ``config`` holds this lane's scalars,
            ``key`` is the step's, the same for all parts of a batch (what is drawn for an example belongs in ``data``),
            ``progress`` the share of the run in [0, 1) that is done.
        needs: ``config -> Needs``.
        reference: ``(model, params, batch, config) -> arrays [b, ...]``, what the reference, an ancestor of the model,
            says of the examples; ``totals`` finds it in ``batch.reference``. None where a method asks nothing of it.
        data: ``(batch, *, key, config) -> batch``, a transform of the drawn examples, before the reference sees them.
        init_aux: ``(params, *, key, config) -> aux``, what a lane carries beside the optimiser's state; ``params`` are
            what is trained, such as an adapter's factors.
        update_aux: ``(aux, means, *, config) -> aux`` after a step, from the means of all terms and metrics over the
            whole batch.
        examples: what a batch is: ``preferences``, a :class:`PreferenceBatch`, ``text``, a :class:`Batch`, or what
            pools of a subject of one's own have.
    """

    Config: type
    totals: Callable[..., tuple[Terms, Terms]]
    needs: Callable[[Any], Needs]
    reference: Callable[..., Any] | None = None
    data: Callable[..., Any] | None = None
    init_aux: Callable[..., Any] | None = None
    update_aux: Callable[..., Any] | None = None
    examples: str = "preferences"


class Pool(NamedTuple):
    """Where training examples come from: all that a study knows of it.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`.
        draw: ``(source, config, *, key, step, total_steps, batch_size) -> examples [b, ...]``, a pure draw of position
            ``step`` of a stream; ``source`` is that of the opened subject, such as a world, and ``config`` holds this
            lane's scalars.
        examples: as in :class:`Method`.
        files: whether the source is the examples of a file, arrays ``[n, ...]``, as studies of checkpoints read them.
        refuses: whether safe prompts are to be answered and unsafe ones refused, as in the examples that the gradients
            of methods are compared on.
        conditions: ``(config) -> names`` of conditions that it draws and that not every subject of its kind has.
    """

    Config: type
    draw: Callable[..., Any]
    examples: str = "preferences"
    files: bool = False
    refuses: bool = False
    conditions: Callable[[Any], tuple[str, ...]] | None = None


class Parametrisation(NamedTuple):
    """What of a model is trained: all that a study knows of it.

    Trees are parameters by role: ``parent``, the model that training begins with, and those of ``roles``.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`; a field of the name of each role
            says which ancestor it is.
        init: ``(trees, *, config, key) -> trained``, the tree that the optimiser moves.
        join: ``(trees, trained, *, config, key=None) -> params`` of the model, at the step of a key, or (None) as it is
            judged, snapshots are taken and the end is kept. ``config`` holds this lane's scalars.
        roles: further trees that it takes.
    """

    Config: type
    init: Callable[..., Any]
    join: Callable[..., Params]
    roles: tuple[str, ...] = ()


@flax.struct.dataclass
class Trial:
    """Prompts with what complying and refusing look like: what a model's answer is judged by.

    ``complied`` and ``refused`` hold the same prompts followed by the true output and by the refusal; each mask marks
    the positions that decide the verdict: for an unsafe prompt the first block in which an operator is unsafe, for a
    safe one both true blocks (and the refusal of block 1). A prompt of which nothing of the refusal is marked is not
    judged.

    Attributes:
        complied: true outputs. Embeddings ``[b, t, d]``, as of ``Model.embed``, may stand in the place of tokens.
        refused: refusals.
        blocks: ``[b, 2, t]`` bool, letters and stop of either block.
        unsafe: ``[b]`` bool, whether refusing is the preferred answer.
        last: ``[b]`` int32, where the last prompt token stands: the input that predicts the first answer token.
        prompt: the instructions, as the subject of the study has them.
    """

    complied: Batch
    refused: Batch
    blocks: Leaf
    unsafe: Leaf
    last: Leaf
    prompt: Any


class Target(NamedTuple):
    """What an attack is made on: one model, and prompts of one condition.

    Attributes:
        model: the model's functions.
        params: its parameters.
        base: those that it was tuned from.
        trial: ``[b, ...]`` prompts, of a condition of the recipe's or of the attack's own; None where answers are
            written, see :class:`Written`.
        stop: the token that ends an answer.
        held_out: ``[2, b, ...]`` other safe and unsafe prompts, in pairs of one text, to find out about the model.
        found: where answers are written, what :class:`Written` finds out about the model.
    """

    model: Model
    params: Params
    base: Params
    trial: Trial | None
    stop: int
    held_out: Trial | None = None
    found: Mapping[str, Leaf] = {}


class Decode(NamedTuple):
    """A decoding rule: ``combine([logits of the target, logits of the others...]) -> logits``, in nats.

    Attributes:
        others: ``(params, model)`` of what decodes beside the target, from the same inputs.
        combine: of ``[b, t, v]`` each, or ``[b, v]`` where answers are written.
        temperature: 0 takes the most likely token; above, tokens are sampled from ``softmax(logits / temperature)``,
            and an answer's rate is its probability.
        draws: sampled answers to every prompt, at least 1; may be traced. Complied is then that one of them does,
            refused that all of them do.
    """

    others: tuple[tuple[Params, Model], ...]
    combine: Callable[[list[Leaf]], Leaf]
    temperature: float = 0.0
    draws: Leaf = 1


class Attacked(NamedTuple):
    """What an attack puts in the place of what was there; None leaves it as it was.

    Attributes:
        trial: ``[b, ...]`` prompts and answers as they are judged.
        params: other parameters.
        edit: a :data:`Hook` on the activations.
        decode: another decoding rule.
        metrics: numbers ``[b]`` of single prompts, by name; their means over the judged prompts are results.
    """

    trial: Trial | None = None
    params: Params | None = None
    edit: Hook | None = None
    decode: Decode | None = None
    metrics: Mapping[str, Leaf] = {}


# By swept field of a Config, the value of one point.
Point = Mapping[str, Any]


class Asked(NamedTuple):
    """Safe and unsafe prompts of a file, to find out about a model: n batches of one shape.

    Attributes:
        tokens: ``[n, b, t]`` int32, padded right.
        mask: ``[n, b, t]`` bool, True where a token is real.
        safe, unsafe: ``[n, b]`` bool; a row that is neither fills its batch, and is none.
        refusals: ``[r]`` int32, the tokens that refusals begin with, each once.
    """

    tokens: Leaf
    mask: Leaf
    safe: Leaf
    unsafe: Leaf
    refusals: Leaf


class Written(NamedTuple):
    """How an attack is made where a model over a checkpoint writes its answers; all of it may be left out.

    Attributes:
        attack: that of :class:`Attack`, or another one, on a target without prompts; what it gives may have parameters,
            an edit, which whatever decodes has, and a decoding rule. Draws are by prompt, whichever are beside it.
        given: ``(config, point) -> (text, count)``: of the answer that the attacker wants, a prompt's target or for
            one without the text, so many first tokens stand before the model's own; ``point`` has plain numbers.
        draws: name of the swept field that says how many sampled answers a prompt has: one that complies is enough, and
            it is refused where all refuse. Those of fewer are the first of those of more.
        find: ``(model, params, asked, config) -> {name: array}``, what is found out about a model beforehand, on half
            of the safe and unsafe prompts (:class:`Asked`); prompts of the other half are answered. It is the target's
            ``found``, and single numbers of it are results.
        base: whether it looks at the target's base, which then is in memory beside the model.
    """

    attack: Callable[..., Attacked] | None = None
    given: Callable[[Any, Point], tuple[str, int]] | None = None
    draws: str | None = None
    find: Callable[..., dict[str, Leaf]] | None = None
    base: bool = False


class Attack(NamedTuple):
    """An attack: all that a study knows of it. It is judged like the model it is made on, at every point.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`; the *swept* ones are its strengths.
        attack: ``(target, config, *, point, key) -> Attacked``; ``point`` has a traced scalar for every swept field.
        condition: ``config -> Condition`` (:mod:`jaxsafety.world.conditions`) of prompts of its own, which then are one
            more condition of the study: every model is judged and analysed on them, too. None attacks the recipe's.
        points: ``config -> points`` where not every combination of the swept values is one.
        inside: whether what the attacked prompts look like inside the model is measured: nearness to the class means
            (of the model without a hook), gain of the update, sensitivity (without another decoding rule).
        section: words around its figure, which is drawn like every attack's (``draw`` is None).
        written: how it is made on the answers that models over a checkpoint write; None where it cannot be made there.
    """

    Config: type
    attack: Callable[..., Attacked]
    condition: Callable[[Any], Any] | None = None
    points: Callable[[Any], Sequence[Point]] | None = None
    inside: bool = False
    section: Section | None = None
    written: Written | None = None


class Edit(NamedTuple):
    """An edit of weights: all that a study knows of it.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`; the *swept* ones are its strengths.
        edit: ``(trees, config, *, point, key) -> params``: ``trees`` by role, in ``point`` a traced scalar for every
            swept field.
        roles: the trees that it takes: ``base`` (before tuning), ``target`` (a tuned model) and ``other`` (another
            method's model of the same base and learning rate: the edit is made with every one). One with further
            roles, such as ``harmful``, makes models alone.
        points: ``(config, base) -> points`` where the values depend on the model's sizes.
        leafwise: whether every layer of a parameter is edited by its own values alone, so that a model too large for
            memory is edited a matrix at a time.
        whole: of a leafwise one, whether an entry depends on others of any parameter: without, all but the layers'
            matrices are edited in slices.
        draws: of a leafwise one, whether it draws by layer: it then takes ``layer``, the index of the first layer that
            it is given.
        merges: whether the target's own update is one of those that it takes, beside an other's.
        reads: sites of the target whose second moments ``[l, f, f]`` it takes as ``moments``, by class and site: of
            what is there, in prompts that nothing is judged on, where ``safe`` ones are answered and where ``unsafe``
            ones are refused, summed over tokens. Such an edit is one of ``edits``, not a model.
        section: its figure of its own, if any, of the rows of ``interventions`` that have its label as their part.
    """

    Config: type
    edit: Callable[..., Params]
    roles: tuple[str, ...] = ("base", "target")
    points: Callable[[Any, Params], Sequence[Point]] | None = None
    leafwise: bool = False
    whole: bool = False
    draws: bool = False
    merges: bool = False
    reads: tuple[str, ...] = ()
    section: Section | None = None


@flax.struct.dataclass
class Seen:
    """Activations ``[l, *x, f]`` at one site on the complied answers of prompts ``x``: at the last prompt token, and
    their mean over the first answer positions."""

    last: Leaf
    response: Leaf


@flax.struct.dataclass
class Verdicts:
    """How one model answers prompts ``[c, b]``.

    Attributes:
        complied, refused, exact_match: bool.
        subsets: ``[c, 2, b]`` bool: the prompts whose first block is judged, where activations mean something, and
            those of them that are successful attacks (unsafe prompts that were complied with).
    """

    complied: Leaf
    refused: Leaf
    exact_match: Leaf
    subsets: Leaf


class View(NamedTuple):
    """What an analysis may look at: one model of one seed, and what it does on that seed's prompts.

    An analysis of pairs has ``model``, ``params``, ``other`` and ``base`` alone.

    Attributes:
        model: the model's functions.
        params: its parameters.
        base: those that it was tuned from.
        parent: where an update is a further one, those of the tuned model that it was made to; ``base`` is what that
            was tuned from.
        other: in pairs, another method's parameters.
        conditions: names of the conditions c.
        trials: ``[c, b, ...]`` prompts by condition: safe, unsafe, then the others.
        held_out: ``[2, b, ...]`` other safe and unsafe prompts.
        seen: by site, :class:`Seen` of ``trials``; the sites are those that the analysis reads.
        held: the same of ``held_out``.
        predicted: ``[c, b, t]`` int32, most likely next tokens on the complied answers.
        verdicts: see :class:`Verdicts`.
        longest: tokens of the longest prompt there can be, the one that predicts the answer included.
        answer: tokens of the longest answer block there can be, its stop included.
        gradients: ``(count) -> {label: tree}``, the gradient of every method's loss on so many safe and unsafe prompts.
    """

    model: Model
    params: Params
    base: Params
    parent: Params | None = None
    other: Params | None = None
    conditions: tuple[str, ...] = ()
    trials: Trial | None = None
    held_out: Trial | None = None
    seen: Mapping[str, Seen] = {}
    held: Mapping[str, Seen] = {}
    predicted: Leaf = None
    verdicts: Verdicts | None = None
    longest: int = 0
    answer: int = 0
    gradients: Callable[[int], dict[str, Params]] | None = None


class Coordinate(NamedTuple):
    """The places along an axis of a measured array: the result column that names them, and their names.

    Attributes:
        column: ``condition``, ``subset``, ``layer``, ``part`` or ``strength``.
        names: at least as many as places; None for the index itself.
    """

    column: str
    names: tuple[Any, ...] | None = None


# (metric, names of the axes in order, separated by spaces) to an array. Beside a metric NAME, tables take NAME_low,
# NAME_high and NAME_n for its interval and number.
Measured = dict[tuple[str, str], Any]


class Section(NamedTuple):
    """A figure of results, and the words around it.

    Attributes:
        title: heading.
        paper: the figure of a paper, or what it goes beyond.
        reading: how to read it, one sentence.
        draw: ``(table, plot) -> picture`` of the rows as a seed table (:mod:`jaxsafety.report.seed_tables`), with
            :mod:`jaxsafety.report.plot` to draw with.
        claims: names of the claims that it bears on.
        also: rows of others that it shows, ``(analysis, metric, ...)`` each; no metric is all of them.
    """

    title: str
    paper: str
    reading: str
    draw: Callable[..., Any] | None = None
    claims: tuple[str, ...] = ()
    also: tuple[tuple[str, ...], ...] = ()


class Analysis(NamedTuple):
    """An analysis: all that a study knows of it. Without its file and its row its numbers and its figure are gone.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`.
        measure: ``(view, config, *, key) -> Measured`` of one lane. The axes that a study names are ``condition``,
            ``class`` (safe, unsafe), ``asked`` (all conditions but safe), ``subset``, ``layer`` and ``pair`` (of
            methods).
        about: every ``model``; every ``update`` of a tuned one; every ``further`` one, of a model that is made from a
            tuned one; every ``pair`` of methods at one learning rate; or checkpoints, which it reads and measures piece
            by piece (``files``): its ``measure`` is then ``(models, config) -> None``, see
            :mod:`jaxsafety.study.checkpoints`.
        reads: the sites whose activations it looks at; of one about files ``prompts``, where it asks for some.
        axes: the places along axes of its own, by name, from its config.
        finish: ``{(metric, axes): [h, s, ...]} -> (the same, axes)`` on the host, once all lanes are measured.
        section: its figure, if any.
    """

    Config: type
    measure: Callable[..., Measured]
    about: Literal["model", "update", "further", "pair", "files"] = "model"
    reads: tuple[str, ...] = ()
    axes: Callable[[Any], dict[str, Coordinate]] | None = None
    finish: Callable[[Measured], tuple[Measured, dict[str, Coordinate]]] | None = None
    section: Section | None = None


class Text(NamedTuple):
    """What a subject tells of its prompts and answers where its models read and write tokens.

    Attributes:
        longest: tokens of the longest prompt there can be, the one that predicts the answer included.
        answer: tokens of the longest answer block there can be, its stop included.
        stop: the token that ends an answer.
        tell: ``(trials [n, ...], answers [m, n, t]) -> rows`` on the host: of every prompt a dict of ``prompt``,
            ``expected`` and ``refusal`` in words, and ``answers``, the (answer in words, verdict) of every model.
    """

    longest: int
    answer: int
    stop: int
    tell: Callable[[Any, Any], list[dict[str, Any]]]


class Opened(NamedTuple):
    """A subject made ready: pure functions of one lane; the study maps, jits and places them.

    Attributes:
        source: what pools draw from, such as a world.
        model: what is measured: a :class:`Model`, or for the subject's own methods and judge a function whose first
            argument are the parameters.
        training: what losses and gradients are taken of: the same, maybe in another precision.
        analysed: what analyses run, each a few times: the same as it compiles fastest.
        init: ``(key) -> params``, fresh ones from the key of their stream.
        trials: ``(condition, *, key, step, batch_size, late_probability) -> trials [b, ...]``, a pure draw of position
            ``step`` of a stream of prompts; for one whose models read tokens :class:`Trial`.
        judge: ``(params, trials) -> {metric: [b]}``, in [0, 1]; ``complied``, ``refused`` and ``exact_match`` are what
            learning curves show.
        late_probability: how often, in the tables, only a later part of an unsafe prompt is unsafe, in [0, 1].
        text: see :class:`Text`; None for a subject without tokens, which then has no attacks, no edits that are
            judged, and no analysis of activations.
        of_seeds: ``(seeds) -> (place) -> Opened``: the subject as the seed in a traced place among some finds it, where
            seeds have data of their own; it may differ in ``source`` and ``trials``. None where all have the same.
    """

    source: Any
    model: Any
    training: Any
    analysed: Any
    init: Callable[[Key], Params]
    trials: Callable[..., Any]
    judge: Callable[[Params, Any], dict[str, Leaf]]
    late_probability: float = 0.0
    text: Text | None = None
    of_seeds: Callable[[tuple[int, ...]], Callable[[Leaf], "Opened"]] | None = None


class Subject(NamedTuple):
    """What a study is about: all that recipes and studies know of it.

    Attributes:
        Config: frozen dataclass of its options, see :mod:`jaxsafety.config.fields`.
        open: ``(config) -> Opened``, the first thing to touch a device; a ValueError refuses what it cannot build. None
            where models are files, each worked on by itself, as checkpoints are.
        conditions: the kinds of prompts that models are judged on: those to be complied with, those to be refused, then
            others. Empty where the prompts' own labels say.
        further: ``(config) -> conditions`` beside them, of which a recipe may name some; None where there are none.
        speaks: whether its models read and write tokens, and so have attacks, edits that are judged and analyses of
            activations.
        models: ``(config, models) -> models`` of a recipe, as it writes them, with those that the subject begins with
            and its own defaults; None where there are none.
        notes: ``(config) -> paragraphs`` of plain text: what a report says of how its models are judged, and of what
            its intervals speak.
    """

    Config: type
    open: Callable[[Any], Opened] | None
    conditions: tuple[str, ...]
    further: Callable[[Any], tuple[str, ...]] | None = None
    speaks: bool = True
    models: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    notes: Callable[[Any], tuple[str, ...]] = lambda config: ()


class Unsupported(ValueError):
    """A model was asked for a part of the contract that it does not have."""


# How the lanes of a grid share the devices; see jaxsafety.engine.sweep.
Strategy = Literal["auto", "vmap", "map", "sharded"]
