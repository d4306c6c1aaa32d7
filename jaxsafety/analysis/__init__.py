"""What is measured of models: ONE FILE AN ANALYSIS, named here.

An analysis' module says what it looks at, how it measures and how that is drawn: ``ANALYSIS``, a
:class:`jaxsafety.types.Analysis`. The maths on arrays lies in :mod:`jaxsafety.linalg`. A recipe names an analysis of
this table, or somebody else's as ``package.module:NAME``.
"""

from functools import partial

from jaxsafety.config import tables

TABLE = {
    "verdicts": "jaxsafety.analysis.verdicts",
    "clusters": "jaxsafety.analysis.clusters",
    "output_space": "jaxsafety.analysis.output_space",
    "input_space": "jaxsafety.analysis.input_space",
    "sensitivity": "jaxsafety.analysis.sensitivity",
    "alignment": "jaxsafety.analysis.alignment",
    "gradients": "jaxsafety.analysis.gradients",
    "refusal_depth": "jaxsafety.analysis.refusal_depth",
    "kept_energy": "jaxsafety.analysis.kept_energy",
    "intruders": "jaxsafety.analysis.intruders",
    "gradient_spaces": "jaxsafety.analysis.gradient_spaces",
    "undoing": "jaxsafety.analysis.undoing",
    "uncertainty": "jaxsafety.analysis.uncertainty",
    "probe": "jaxsafety.analysis.probe",
}
# What is measured where a recipe names none: what the paper's statements, and ours about its updates, are about.
DEFAULT = tuple(name for name in TABLE if name not in ("probe", "uncertainty", "undoing"))
# Those of checkpoints, which read them piece by piece.
OF_CHECKPOINTS = {
    "weights": "jaxsafety.study.checkpoints.weights",
    "activations": "jaxsafety.study.checkpoints.activations",
}
# An analysis by its name here, or as ``package.module:NAME``; raises as :func:`jaxsafety.config.tables.load`.
load = partial(tables.load, table=TABLE | OF_CHECKPOINTS, kind="analysis")
