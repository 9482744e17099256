"""What the operating system has: signals, files, folders, addresses."""
