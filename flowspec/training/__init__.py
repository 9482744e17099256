"""Training of draft heads and the bundled models."""
