"""Studies: each is a function returning a grid of records and the questions it answers."""
