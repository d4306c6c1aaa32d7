"""Attacks on a safety fine-tuned model: ONE FILE AN ATTACK, named here.

An attack's module holds what it does on arrays, for whoever imports it, then ``ATTACK``, a
:class:`jaxsafety.types.Attack`. A recipe names an attack of this table, or somebody else's as ``package.module:NAME``.
"""

from typing import TYPE_CHECKING

from jaxsafety.config import tables

if TYPE_CHECKING:
    from jaxsafety.types import Attack

TABLE = {
    "prefill": "jaxsafety.attacks.prefill",
    "soft_tokens": "jaxsafety.attacks.soft_tokens",
}


def load(name: str) -> "Attack":
    """Returns an attack by its name in the table, or as ``package.module:NAME``.

    Raises:
        ValueError: there is no such attack; the nearest is named.
    """
    from jaxsafety.types import Attack

    return tables.load(name, TABLE, kind="attack", record=Attack)
