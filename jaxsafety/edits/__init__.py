"""Edits of weights: ONE FILE AN EDIT, named here.

An edit's module holds what it does on trees, for whoever imports it, then ``EDIT``, a :class:`jaxsafety.types.Edit`. A
recipe names an edit of this table, or somebody else's as ``package.module:NAME``.
"""

from typing import TYPE_CHECKING

from jaxsafety.config import tables

if TYPE_CHECKING:
    from jaxsafety.types import Edit

TABLE = {
    "scaled": "jaxsafety.edits.scaled",
    "space_part": "jaxsafety.edits.space_part",
    "rank_part": "jaxsafety.edits.rank_part",
    "layer_part": "jaxsafety.edits.layer_part",
    "transferred": "jaxsafety.edits.transferred",
}


def load(name: str) -> "Edit":
    """Returns an edit by its name in the table, or as ``package.module:NAME``.

    Raises:
        ValueError: there is no such edit; the nearest is named.
    """
    from jaxsafety.types import Edit

    return tables.load(name, TABLE, kind="edit", record=Edit)
