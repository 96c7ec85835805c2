"""Data sets: each file makes one `Dataset`; `load` finds it by name."""
