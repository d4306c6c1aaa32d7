"""The analyses bound to the world and the GPT, as pure functions of a single lane: one model, its base, its prompts.

Each returns :data:`~jaxsafety.analysis.quantities.Quantities`, arrays labelled by what they are and by their axes.
"""
