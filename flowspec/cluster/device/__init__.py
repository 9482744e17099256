"""A device of a cluster: its report, its layers, its stage."""
