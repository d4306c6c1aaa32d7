"""A study as data: fields, files, grids."""
