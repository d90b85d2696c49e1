"""Tasks that say how good a model is, and whether its memory is worth having."""
