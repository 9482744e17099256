"""The head of a cluster, which serves devices and clients."""
