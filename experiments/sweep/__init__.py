"""Sweeps of finetune runs over some settings: the plan, the processes, the table.

Nothing is offered here: `experiments.grid` imports the modules.
"""
