"""NNX modules: attention with a memory, adapters, norms, caches.

Nothing is offered here: `tptt_jax` offers `LinearAttention`, and a model is made of the others.
"""
