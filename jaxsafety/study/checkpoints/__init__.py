"""The analyses of two checkpoints, one tuned from the other: weights, activations, and merges of the two.

What is measured is measured as in the synthetic study, by the same functions and under the same names. A checkpoint is
read a matrix or a layer at a time, so that memory does not grow with the depth of the model.
"""
