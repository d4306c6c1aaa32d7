"""What is measured of models: ONE FILE AN ANALYSIS, named here.

An analysis' module says what it looks at, how it measures and how that is drawn: ``ANALYSIS``, a
:class:`jaxsafety.types.Analysis`. The maths on arrays lies in :mod:`jaxsafety.linalg`. A recipe names an analysis of
this table, or somebody else's as ``package.module:NAME``.
"""

from typing import TYPE_CHECKING

from jaxsafety.config import tables

if TYPE_CHECKING:
    from jaxsafety.types import Analysis

TABLE = {
    "verdicts": "jaxsafety.analysis.verdicts",
    "clusters": "jaxsafety.analysis.clusters",
    "output_space": "jaxsafety.analysis.output_space",
    "input_space": "jaxsafety.analysis.input_space",
    "sensitivity": "jaxsafety.analysis.sensitivity",
    "alignment": "jaxsafety.analysis.alignment",
    "gradients": "jaxsafety.analysis.gradients",
    "refusal_depth": "jaxsafety.analysis.refusal_depth",
}


def load(name: str) -> "Analysis":
    """Returns an analysis by its name in the table, or as ``package.module:NAME``.

    Raises:
        ValueError: there is no such analysis; the nearest is named.
    """
    from jaxsafety.types import Analysis

    return tables.load(name, TABLE, kind="analysis", record=Analysis)
