"""Signals, files, folders and network addresses of the operating system."""
