"""The n-gram drafter, which drafts from the text so far."""
