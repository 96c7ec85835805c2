"""What can be said of a record without training it: its cost, its equation, its picture, its proofs."""
