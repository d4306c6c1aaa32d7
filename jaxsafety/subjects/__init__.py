"""What a study is about: ONE FILE A SUBJECT, named here.

A recipe's ``subject`` has the fields of one: ``{world: tiny}``, ``{checkpoint: DIR}``, ``{trajectory: 8}``, or
those of somebody else's beside ``kind: package.module:SUBJECT``.
"""

from functools import partial

from jaxsafety.config import tables

# Each by its first field, which tells it.
TABLE = {
    "world": "jaxsafety.subjects.synthetic",
    "checkpoint": "jaxsafety.subjects.checkpoint",
    "trajectory": "jaxsafety.subjects.trajectory",
}
# A subject by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE, kind="subject")
