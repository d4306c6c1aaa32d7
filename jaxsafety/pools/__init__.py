"""Where training examples come from: ONE FILE A POOL, named here.

A recipe's ``data`` names a pool of this table, or somebody else's as ``package.module:POOL``.
"""

from functools import partial

from jaxsafety.config import tables

TABLE = {
    "text": "jaxsafety.pools.text",
    "safety": "jaxsafety.pools.safety",
    "cipher": "jaxsafety.pools.cipher",
    "explicit": "jaxsafety.pools.explicit",
    "identity": "jaxsafety.pools.identity",
    "new_task": "jaxsafety.pools.new_task",
    "relearn": "jaxsafety.pools.relearn",
    "pairs": "jaxsafety.pools.pairs",
    "labelled": "jaxsafety.pools.labelled",
}
# A pool by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE, kind="pool")
