"""Plots of sample records and traces; importing this imports matplotlib."""
