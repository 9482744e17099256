"""Encryption, authentication, and who is let in."""
