"""Recognises a draft checkpoint by its tensors and its config."""
