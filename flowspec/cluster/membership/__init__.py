"""The members of the cluster and the placement of its layers, without input or output."""
