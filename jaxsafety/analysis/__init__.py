"""The mechanics of an update as pure functions of weights and activations: no world, no model, no trainer.

``clusters`` (features), ``update_spaces`` (parameters), ``sensitivity`` (local Lipschitz), ``interventions`` (parts and
multiples of an update), ``alignment`` (of two updates) and ``claims`` (the paper's statements, judged by data).
"""
