"""Benchmarks: questions, experiments, records, and what is made of them."""
