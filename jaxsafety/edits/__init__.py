"""Edits of weights, one file each."""
