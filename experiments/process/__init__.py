"""The process of a command: huge pages, garbage collection, signals, memory, output folders.

Nothing is offered here: some modules are imported before jax is, others import it.
"""
