"""Acceptance rules: which token follows."""
