"""Benchmarks: questions, experiments, records, and their analysis."""
