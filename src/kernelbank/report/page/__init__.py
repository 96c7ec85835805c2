"""The page of a report: one HTML file with its style, script and plotting library inside. Imports no torch."""
