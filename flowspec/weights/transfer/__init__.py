"""Weight transfer from the head to the devices."""
