"""Traces of a run, and where its time went."""
