"""Training methods: ONE FILE A METHOD, named here.

A method's module holds its loss on arrays, for whoever imports it, then what the study and the tuning of checkpoints
train by: ``METHOD``, a :class:`jaxsafety.types.Method`. A recipe names a method of this table, or somebody else's as
``package.module:NAME``.
"""

from functools import partial

from jaxsafety.config import tables

TABLE = {
    "pretrain": "jaxsafety.methods.pretrain",
    "sft": "jaxsafety.methods.sft",
    "dpo": "jaxsafety.methods.dpo",
    "unlearn": "jaxsafety.methods.unlearn",
    "ipo": "jaxsafety.methods.ipo",
    "robust_dpo": "jaxsafety.methods.robust_dpo",
    "simpo": "jaxsafety.methods.simpo",
    "npo": "jaxsafety.methods.npo",
    "simnpo": "jaxsafety.methods.simnpo",
    "graddiff": "jaxsafety.methods.graddiff",
    "derta": "jaxsafety.methods.derta",
    "deep_alignment": "jaxsafety.methods.deep_alignment",
    "constrained_sft": "jaxsafety.methods.constrained_sft",
    "primal_dual": "jaxsafety.methods.primal_dual",
    "rmu": "jaxsafety.methods.rmu",
    "circuit_breakers": "jaxsafety.methods.circuit_breakers",
    "adversarial": "jaxsafety.methods.adversarial",
    "tamper_resistant": "jaxsafety.methods.tamper_resistant",
    "classify": "jaxsafety.methods.classify",
    "constrained": "jaxsafety.methods.constrained",
}
# A method by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE, kind="method")
