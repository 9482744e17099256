"""Drafting from the text so far."""
