"""Training: a recipe is data, the loop is a function of (model, data, recipe, seed)."""
