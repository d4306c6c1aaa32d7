"""How options are named, declared and checked. Nothing here imports jax."""
