"""Many runs of finetune that differ in some settings: the plan, the processes, the table.

Nothing is offered here: `experiments.grid` imports the modules.
"""
