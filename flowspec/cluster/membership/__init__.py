"""Who is in the cluster and who holds which layers. No input or output."""
