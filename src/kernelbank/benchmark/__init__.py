"""Models and records side by side: what they cost on this machine, measured in turns."""
