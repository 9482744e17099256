"""Traces of a run, and the analysis of where its time went."""
