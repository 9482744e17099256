"""The messages between head and stages, and between head, devices and clients."""
