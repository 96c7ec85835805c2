"""What is known of a spec without training it: its cost, equation, diagram, figure and proofs."""
