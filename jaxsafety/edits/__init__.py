"""Edits of weights: ONE FILE AN EDIT, named here.

An edit's module holds what it does on trees, for whoever imports it, then ``EDIT``, a :class:`jaxsafety.types.Edit`. A
recipe names an edit of this table, or somebody else's as ``package.module:NAME``.
"""

from functools import partial

from jaxsafety.config import tables

TABLE = {
    "scaled": "jaxsafety.edits.scaled",
    "space_part": "jaxsafety.edits.space_part",
    "rank_part": "jaxsafety.edits.rank_part",
    "directions": "jaxsafety.edits.directions",
    "layer_part": "jaxsafety.edits.layer_part",
    "transferred": "jaxsafety.edits.transferred",
    "trim": "jaxsafety.edits.trim",
    "hdr": "jaxsafety.edits.hdr",
    "ties": "jaxsafety.edits.ties",
    "dare": "jaxsafety.edits.dare",
    "landscape": "jaxsafety.edits.landscape",
    "lox": "jaxsafety.edits.lox",
    "safe_projection": "jaxsafety.edits.safe_projection",
    "pruned": "jaxsafety.edits.pruned",
    "pruned_ranks": "jaxsafety.edits.pruned_ranks",
}
# An edit by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE, kind="edit")
