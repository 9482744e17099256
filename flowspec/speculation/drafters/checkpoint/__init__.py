"""What a draft checkpoint is, decided by its tensors and its config."""
