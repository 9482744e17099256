"""Every core of a cluster in one process, on a virtual clock."""
