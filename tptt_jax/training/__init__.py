"""Partition, loss, optimizer, compiled steps, checkpoints."""
