"""Files of prompts and answers in the shapes that people have, read as rows of ours; and how they were read, in words.

Rows of our columns alone are refused where something is wrong; of another set those from which nothing can be learnt
are left out, which is said.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from jaxsafety.config.names import check_name, nearest
from jaxsafety.formats import rows_file
from jaxsafety.formats.rows_file import Row, shown
from jaxsafety.formats.shapes import OURS, TABLE, Shape, Unfit, Wanted

# How alike a column is to one that is missing if it is that one misspelt.
_NEAR = 0.75
_OURS = frozenset((*OURS, "target"))
# What must hold something, by what is read.
_READ: dict[Wanted, tuple[str, ...]] = {"label": ("prompt", "messages")}
_READ["answer"] = (*_READ["label"], "chosen", "completion")
_READ["pair"] = (*_READ["answer"], "rejected")


@dataclass(frozen=True)
class Reading:
    """What a file was read as.

    Attributes:
        path: the file.
        columns: of the file.
        kinds: how many rows of each shape there were.
        unused: columns that nothing was read from, as they first came.
        left_out: where and why, of every row that was left out.
        first: the first row, as one of ours.
    """

    path: Path
    columns: tuple[str, ...]
    kinds: Mapping[str, int]
    unused: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]
    first: Row

    def told(self, found: str) -> Iterator[str]:
        """Yields how the file was read and what was ``found`` in it, a line each."""
        kinds = [f"{name} ({rows:,})" if len(self.kinds) > 1 else name for name, rows in self.kinds.items()]
        more = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        yield f"{self.path.name} read as {' and '.join(kinds)}: {found}{more}"
        yield f"  the first: {', '.join(f'{name} {shown(_said(value))}' for name, value in self.first.items())}"
        if self.left_out:
            where, why = self.left_out[0]
            rows = sum(self.kinds.values()) + len(self.left_out)
            yield f"  left out: {len(self.left_out):,} of {rows:,} rows, the first {where}, as {why}"


def _said(value: Any) -> Any:
    """What the turns of a conversation say, anything else as it is."""
    is_talk = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    return " / ".join(str(turn.get("content")) for turn in value) if is_talk else value


class Found(NamedTuple):
    """A row as one of ours, where it stands, for messages, and its shape."""

    row: Row
    where: str
    shape: Shape


def read(path: Path, wanted: Wanted, *, columns: Sequence[str], what: str, such: str) -> tuple[list[Found], Reading]:
    """Returns the rows of a file as ours, and how it was read.

    ``columns`` are names of ours for those of the file, ``prompt=goal``; one for another file is passed over.
    ``what`` the rows are, and ``such`` what is expected, in words.

    Raises:
        ImportError: a Parquet file, and no polars.
        ValueError: no such file, or none of its rows can be used; one that is none, with its place.
    """
    names, fits = _renames(columns), {}
    found, left_out, kinds, unused, noted, columns_there = [], [], Counter(), {}, set(), {}
    for given, where in rows_file.rows(path, what=what, such=such):
        key, row = tuple(given), _renamed(given, names)
        if key not in fits:
            columns_there |= dict.fromkeys(key)
            fits[key] = _fitting(row, wanted, where, such, names=names)
        shape = _chosen(fits[key], row)
        _check_spelling(shape.without, row, where)
        try:
            own = _own(shape, row, wanted, path)
        except Unfit as error:
            left_out.append((where, str(error)))
            continue
        except ValueError as error:
            raise ValueError(f"{where} {error}" if str(error).startswith("has no ") else f"{where}: {error}") from error
        kinds[shape.name] += 1
        if (key, shape.name) not in noted:
            noted.add((key, shape.name))
            unused |= dict.fromkeys(name for name in row if name not in shape.columns)
        found.append(Found(own, where, shape))
    if not found:
        raise ValueError(f"{left_out[0][0]}: {left_out[0][1]}, and no row of {path} is left: expected {such}")
    return found, Reading(path, tuple(columns_there), kinds, tuple(unused), tuple(left_out), found[0].row)


def _own(shape: Shape, row: Row, wanted: Wanted, path: Path) -> Row:
    own = shape.read(row)
    optional = {*shape.uses} - {*shape.needs, "label"}
    own = {name: value for name, value in own.items() if value is not None or name not in optional}
    if shape.labels:
        known = [label for word, label in shape.labels if word in path.name.lower()]
        if len(known) == 1:
            own["label"] = known[0]
        elif wanted == "label":
            words = " or ".join(word for word, _ in shape.labels)
            raise ValueError(f"{shape.name} that are {words} have the same columns: expected one of these words in "
                             f"the file's name, got {path.name}")  # fmt: skip
    # What has our columns alone is checked by who reads it.
    if not row.keys() <= _OURS:
        _check_usable(own, wanted)
    return own


def _check_usable(own: Row, wanted: Wanted) -> None:
    """Raises :class:`Unfit` for a row of another's set from which nothing can be learnt."""
    for name in _READ[wanted]:
        value = own.get(name, "-")
        texts = (
            [turn.get("content") for turn in value if isinstance(turn, dict)] if isinstance(value, list) else [value]
        )
        for text in texts if value != [] else [None]:
            if text is None or (isinstance(text, str) and not text.strip()):
                raise Unfit(f"{name} is empty")
    if wanted != "pair":
        return
    talks = [own.get("chosen", own.get("completion")), own["rejected"]]
    if talks[0] == talks[1]:
        raise Unfit("chosen and rejected are the same")
    if all(isinstance(talk, list) for talk in talks) and talks[0][:-1] != talks[1][:-1]:
        raise Unfit("chosen and rejected differ before their last turn")


def _renames(columns: Sequence[str]) -> list[tuple[str, str]]:
    names, known = [], list(dict.fromkeys((*OURS, *(name for shape in TABLE for name in shape.needs))))
    for one in columns:
        ours, equals, theirs = one.partition("=")
        if not (ours and equals and theirs):
            raise ValueError(f"columns: got {one!r}, expected our name and the file's, such as prompt=goal")
        check_name("column of ours in columns", ours, known)
        names.append((ours, theirs))
    return names


def _renamed(row: Row, names: Sequence[tuple[str, str]]) -> Row:
    there = [(ours, theirs) for ours, theirs in names if theirs in row]
    if not there:
        return row
    gone = {theirs for _, theirs in there}
    return {name: value for name, value in row.items() if name not in gone} | {
        ours: row[theirs] for ours, theirs in there
    }


def _fitting(row: Row, wanted: Wanted, where: str, such: str, *, names: Sequence[tuple[str, str]]) -> list[Shape]:
    """The shapes of these columns from which what is wanted can be read, at least one."""
    there = [shape for shape in TABLE if row.keys() >= {*shape.needs}]
    if found := [shape for shape in there if wanted in shape.gives]:
        return found
    for ours, theirs in names:
        if ours not in row and (hint := nearest(theirs, row)):
            raise ValueError(f"{where} has no column {theirs!r}, which columns: {ours}={theirs} names{hint}")
    for shape in TABLE:
        if wanted in shape.gives:
            _check_spelling([name for name in shape.needs if name not in row], row, where)
    has = "one answer" if any("answer" in shape.gives for shape in there) else "no answer"
    missing = "rejected" if has == "one answer" else "chosen and no rejected" if wanted == "pair" else "chosen"
    if wanted == "label":
        has, missing, such = "none", "label", "safe, unsafe or jailbreak:KIND"
        if "label" in row:
            raise ValueError(f"{where} must have either prompt or messages, got neither{_columns(row)}")
    # Of columns of ours alone nobody asks what set they are.
    of = f", as {there[-1].name} have {has}" if there and not row.keys() <= _OURS else ""
    raise ValueError(f"{where} has no {missing}{of}: expected {such}{'' if there else _columns(row)}")


def _columns(row: Row) -> str:
    return f"; its columns are {', '.join(row)}, and --columns prompt=NAME says which is which"


def _check_spelling(missing: Sequence[str], row: Row, where: str) -> None:
    """Refuses columns that look like all that are missing, misspelt; ``prompt_id`` is no misspelling of ``prompt``."""
    near = [next((other for other in row if _is_near(other, name)), None) for name in missing]
    if missing and all(near):
        raise ValueError(f"unknown column in {where} {near[0]!r}: did you mean {missing[0]!r}?")


def _is_near(other: str, name: str) -> bool:
    is_alike = SequenceMatcher(None, name, other).ratio() >= _NEAR
    return is_alike and other not in OURS and name not in other.split("_")


def _chosen(shapes: Sequence[Shape], row: Row) -> Shape:
    """The first shape that a row's values are like; of those the first whose columns are not empty, if there is one."""
    alike = [shape for shape in shapes if shape.when is None or shape.when(row)]
    return next((shape for shape in alike if all(row[name] is not None for name in shape.needs)), alike[0])
