"""Data sets. Each source has a file, and `load` opens a data set by its name."""
