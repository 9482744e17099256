"""Weights from the head to the devices that hold them."""
