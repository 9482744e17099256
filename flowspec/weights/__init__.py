"""Checkpoints, splits and their way to devices."""
