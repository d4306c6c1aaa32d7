"""What of a model is trained: ONE FILE A PARAMETRISATION, named here.

A recipe's ``parametrisation`` names one of this table, or somebody else's as ``package.module:PARAMETRISATION``.
"""

from functools import partial

from jaxsafety.config import tables

TABLE = {
    "full": "jaxsafety.parametrisations.full",
    "lora": "jaxsafety.parametrisations.lora",
    "mask": "jaxsafety.parametrisations.mask",
}
# One by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE, kind="parametrisation")
