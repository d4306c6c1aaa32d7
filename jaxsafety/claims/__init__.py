"""The statements of papers, and the statistics that judge them."""
