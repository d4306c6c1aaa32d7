"""A run directory: lock, manifest, metrics, checkpoints, results, status, signals, progress."""
