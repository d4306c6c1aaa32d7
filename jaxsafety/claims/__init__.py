"""Statements of papers, ONE FILE A PAPER, named here, and the statistics that judge them.

A paper's module holds ``CLAIMS``, a tuple of :class:`jaxsafety.claims.judging.Claim`. A recipe names a paper of this
table, or somebody else's statements as ``package.module:CLAIMS``.
"""

from typing import TYPE_CHECKING

from jaxsafety.config import tables

if TYPE_CHECKING:
    from jaxsafety.claims.judging import Claim

TABLE = {
    "benign": "jaxsafety.claims.benign",
    "gradients": "jaxsafety.claims.gradients",
    "halawi2024": "jaxsafety.claims.halawi2024",
    "hazra2024": "jaxsafety.claims.hazra2024",
    "jain2024": "jaxsafety.claims.jain2024",
    "kumar2024": "jaxsafety.claims.kumar2024",
    "low2023": "jaxsafety.claims.low2023",
    "peng2024": "jaxsafety.claims.peng2024",
    "qi2023": "jaxsafety.claims.qi2023",
    "updates": "jaxsafety.claims.updates",
    "yi2024": "jaxsafety.claims.yi2024",
    "yuan2024": "jaxsafety.claims.yuan2024",
    "zhou2024": "jaxsafety.claims.zhou2024",
}
# What a recipe is judged by that names none: of what everybody measures.
DEFAULT = ("jain2024",)


def load(name: str) -> "tuple[Claim, ...]":
    """Returns a paper's statements by its name in the table, or as ``package.module:CLAIMS``; raises a ValueError."""
    from jaxsafety.claims.judging import Claim

    found = tables.load(name, TABLE, kind="claims", record=tuple)
    for one in found:
        if not isinstance(one, Claim):
            raise ValueError(f"claims {name!r} hold a {type(one).__name__}, expected jaxsafety.claims.judging.Claim")
    return found
