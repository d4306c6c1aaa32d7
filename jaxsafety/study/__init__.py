"""Runs a recipe: trains, judges, analyses."""
