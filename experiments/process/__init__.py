"""What commands do to and ask of their process: pages, garbage, signals, memory, output folders.

Nothing is offered here: some modules are imported before jax is, others import it.
"""
