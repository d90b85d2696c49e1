"""State tracking: can a linear memory track the state of a group?

Nothing is offered here: `experiments.state_tracking` imports the modules.
"""
