"""Tasks that say how good a model is, and whether its memory is worth having.

Nothing is offered here: `experiments.evaluate` puts the tasks together, a module each.
"""
