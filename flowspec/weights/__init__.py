"""Checkpoints, splits, and their transfer to devices."""
