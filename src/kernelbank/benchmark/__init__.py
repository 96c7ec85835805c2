"""Measure the time and memory of models and specs on this machine. All of them take turns in one process."""
