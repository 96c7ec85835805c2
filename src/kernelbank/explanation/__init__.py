"""What the mixers of a model do on an image: their maps and kernels, statistics of them, and a page to look at."""
