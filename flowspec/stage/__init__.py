"""A stage: it runs its layers over rows that come in and hands them on."""
