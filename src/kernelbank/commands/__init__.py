"""The verbs of the command line: one file each, with its options. Imports no torch before the options are known."""
