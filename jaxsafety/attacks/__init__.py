"""Attacks on a safety fine-tuned model as pure functions: soft tokens in the embedding, prefilled answers."""
