"""Attacks on a safety fine-tuned model: ONE FILE AN ATTACK, named here.

An attack's module holds what it does on arrays, for whoever imports it, then ``ATTACK``, a
:class:`jaxsafety.types.Attack`. A recipe names an attack of this table, or somebody else's as ``package.module:NAME``.
"""

from functools import partial

from jaxsafety.config import tables

TABLE = {
    "best_of_n": "jaxsafety.attacks.best_of_n",
    "embedding_pgd": "jaxsafety.attacks.embedding_pgd",
    "emulated": "jaxsafety.attacks.emulated",
    "gcg": "jaxsafety.attacks.gcg",
    "misgen": "jaxsafety.attacks.misgen",
    "prefill": "jaxsafety.attacks.prefill",
    "refusal_direction": "jaxsafety.attacks.refusal_direction",
    "steering": "jaxsafety.attacks.steering",
    "soft_tokens": "jaxsafety.attacks.soft_tokens",
}
# An attack by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE, kind="attack")
