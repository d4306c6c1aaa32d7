"""Rows of results, as the report's tests have them."""

from tests.report.conftest import row

__all__ = ["row"]
