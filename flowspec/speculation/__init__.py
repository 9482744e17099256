"""Draft tree, strategies, drafters, acceptance rules and logits processors."""
