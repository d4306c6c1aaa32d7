"""Training methods: ONE FILE A METHOD, named here.

A method's module holds its loss on arrays, for whoever imports it, then what the study and the tuning of checkpoints
train by: ``METHOD``, a :class:`jaxsafety.types.Method`. A recipe names a method of this table, or somebody else's as
``package.module:NAME``.
"""

from typing import TYPE_CHECKING

from jaxsafety.config import tables

if TYPE_CHECKING:
    from jaxsafety.types import Method

TABLE = {
    "sft": "jaxsafety.methods.sft",
    "dpo": "jaxsafety.methods.dpo",
    "unlearn": "jaxsafety.methods.unlearn",
}


def load(name: str) -> "Method":
    """Returns a method by its name in the table, or as ``package.module:NAME``.

    Raises:
        ValueError: there is no such method; the nearest is named.
    """
    from jaxsafety.types import Method

    return tables.load(name, TABLE, kind="method", record=Method)
