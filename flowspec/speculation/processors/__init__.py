"""Logits processors: the distribution that is sampled."""
