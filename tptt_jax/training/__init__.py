"""Partition, loss, optimizer, compiled steps, checkpoints.

Nothing is offered here: loops import the modules, first `partition`, `loss` and `train_step`.
"""
