"""Transports: send bytes between processes."""
