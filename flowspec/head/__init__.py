"""The head: it grows the draft tree and decides what goes into the pipeline next."""
