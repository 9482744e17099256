"""The stages: each runs its layers over the rows that come in and sends the results on."""
