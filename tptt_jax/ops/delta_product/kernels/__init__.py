"""The DeltaProduct operator as Pallas kernels: `solve`, `states` and `read`, and their gradients.

They follow the split of flash-linear-attention (arXiv:2406.06484): what chunks do by themselves is
parallel over chunks, only the state goes from chunk to chunk.
"""
