"""Engines: a head with its stages, wherever these run, behind one interface."""
