"""Training draft heads and the bundled models."""
