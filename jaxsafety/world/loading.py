"""A world from its file: one that ships, by name, or somebody's own YAML, and the grammars of its text conditions."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

from jaxsafety.config import fields as fields_
from jaxsafety.config import yaml12
from jaxsafety.config.names import check_name
from jaxsafety.world import drawn, grammar, operators
from jaxsafety.world.grammar import Grammar
from jaxsafety.world.operators import Policy
from jaxsafety.world.spec import PRETRAIN_TRIM, TextCondition, World, WorldSpec

SHIPPED = ("paper", "tiny")
_ENDINGS = (".yaml", ".yml")
_OURS = resources.files("jaxsafety.world")


def is_file(name: str | Path) -> bool:
    """Whether a world is named by a file of its own."""
    return Path(name).suffix in _ENDINGS


@dataclass(frozen=True)
class Source:
    """What a world is made of: its spec, and the folder of its grammars, which ``is_own`` where it does not ship."""

    spec: WorldSpec
    grammars: Traversable
    is_own: bool

    @property
    def files(self) -> dict[str, Traversable]:
        """Its grammar files by name: of every text condition the upper rules, of every PCFG the leaves."""
        upper = [f"upper_{condition}.pcfg" for condition in get_args(TextCondition)]
        leaves = [f"leaves_{number}.pcfg" for number in range(1, len(self.spec.policies) + 1)]
        return {name: self.grammars / name for name in (*upper, *leaves)}


def source(name: str | Path) -> Source:
    """Returns what a world is made of, by the name of one that ships or by the path of a YAML file.

    The file has the fields of :class:`~jaxsafety.world.spec.WorldSpec`, with ``duplicates`` as a mapping from token to
    operator and policies as mappings. ``like: tiny`` takes what it leaves out from a world that ships; ``grammars`` is
    a folder beside it with ``upper_CONDITION.pcfg`` for every text condition and ``leaves_1.pcfg`` and so on for every
    PCFG; without it they are those of ``like``.

    Raises:
        ValueError: an unknown name, no file, a field that there is not, or what makes no world.
    """
    if not is_file(name):
        check_name("world", name, SHIPPED)
        return _source(str(name), _shipped(str(name)), None, like=str(name))
    path = Path(name)
    given = yaml12.read(path, what="a world", such="like: tiny")
    like, folder = given.pop("like", None), given.pop("grammars", None)
    if like is not None:
        check_name(f"world that {path} is like", like, SHIPPED)
        given = _shipped(like) | given
    elif folder is None:
        raise ValueError(f"{path}: expected `like`, one of {', '.join(SHIPPED)}, or `grammars`, a folder beside it")
    return _source(str(path), given, None if folder is None else path.parent / str(folder), like=like)


def _shipped(name: str) -> dict[str, Any]:
    return yaml12.load((_OURS / "worlds" / f"{name}.yaml").read_text(encoding="utf-8"))


def _source(owner: str, values: dict[str, Any], folder: Path | None, *, like: str | None) -> Source:
    if (duplicates := values.get("duplicates")) is not None:
        pairs = list(duplicates.items()) if isinstance(duplicates, dict) else duplicates
        if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) for pair in pairs):
            raise ValueError(f"{owner}: duplicates: got {duplicates!r}, expected a mapping from token to operator")
        values["duplicates"] = pairs
    if isinstance(values.get("policies"), list):
        values["policies"] = [
            fields_.build(Policy, one, owner=f"{owner}: policy {number}") if isinstance(one, dict) else one
            for number, one in enumerate(values["policies"], 1)
        ]
    spec = fields_.build(WorldSpec, {"name": Path(owner).stem} | values, owner=owner)
    return Source(spec, _OURS / "grammars" / like if folder is None else folder, folder is not None)


def load(name: str | Path, *, grammars: Mapping[str, str | Path] | None = None, drawn_by: int | None = None) -> World:
    """Builds the world ``paper`` or ``tiny``, or that of a YAML file; see :func:`source`.

    ``grammars`` are text conditions whose grammar is read from a file of the user's instead, in NLTK's PCFG notation
    over the world's letters; leaf nonterminals that it uses without defining them are the world's own. ``drawn_by`` is
    a seed that draws a world of this kind for itself; see :mod:`jaxsafety.world.drawn`.

    Raises:
        ValueError: unknown world or text condition, a file that makes no world, a grammar file that cannot be read, or
            a bad grammar (see :mod:`jaxsafety.world.grammar`).
    """
    found, conditions, own = source(name), get_args(TextCondition), dict(grammars or {})
    for condition in own:
        check_name("text condition", condition, conditions)
    if drawn_by is not None:
        found = replace(found, spec=drawn.redrawn(found.spec, seed=drawn_by))
    spec = found.spec
    tables = {condition: _load_grammar(found, condition, own.get(condition), drawn_by) for condition in conditions}
    ids = {token: i for i, token in enumerate(spec.tokens)}
    bijections = operators.bijection_table(
        spec.operators, duplicates=spec.duplicates, letters=len(spec.letters), seeds=spec.permutation_seeds,
        late=spec.late_operators,
    )  # fmt: skip
    return World(spec=spec, grammars=tables, bijections=bijections, ids=ids)


def _load_grammar(found: Source, condition: str, path: str | Path | None, drawn_by: int | None) -> Grammar:
    spec, files = found.spec, found.files
    upper = _read(files[f"upper_{condition}.pcfg"] if path is None else Path(path), condition)
    leaves = [_read(files[f"leaves_{number}.pcfg"], condition) for number in range(1, len(spec.policies) + 1)]
    name = f"{spec.name}/{condition}" if path is None else str(path)
    if drawn_by is not None:
        upper = drawn.reweighted(upper, seed=drawn_by, part="upper")
        leaves = [drawn.reweighted(one, seed=drawn_by, part=f"leaves {i}") for i, one in enumerate(leaves, 1)]
    texts = [grammar.compose(upper, leaf, name=name) for leaf in leaves]
    compiled = grammar.compile_grammar(texts, name=name, alphabet=spec.letters)
    trim = PRETRAIN_TRIM if condition == "full" else 0
    grammar.check_window(compiled, max_window=spec.max_text, trim=trim)
    if len(set(texts)) < len(texts):
        raise ValueError(
            f"grammar {name!r} defines all its leaves itself, so its text is the same in every PCFG while their "
            f"operators differ: leave some of {_leaf_names(leaves[0])} to the world"
        )
    return compiled


def _read(path: Traversable, condition: str) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the grammar file {path} of text condition {condition!r}: {error}") from error


def _leaf_names(leaves: str) -> str:
    rules = (line.split("->") for line in leaves.splitlines() if "->" in line and not line.startswith("#"))
    return ", ".join(rule[0].strip() for rule in rules)
