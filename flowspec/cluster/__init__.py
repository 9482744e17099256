"""A cluster of devices that join: its head, its membership, its devices."""
