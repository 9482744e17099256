"""Encryption, authentication, and admission of connections."""
