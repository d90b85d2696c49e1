"""State tracking: can a linear memory follow the state of a group?

Nothing is offered here: `experiments.state_tracking` imports the modules.
"""
