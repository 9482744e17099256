"""Plots of sample records and traces. Importing it imports matplotlib."""
