"""NNX modules: attention with a memory, adapters, norms, caches."""
