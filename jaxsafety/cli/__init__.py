"""The command line, imported without jax."""
