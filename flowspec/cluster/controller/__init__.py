"""The head of a cluster: devices and clients on one side, the core on the other."""
