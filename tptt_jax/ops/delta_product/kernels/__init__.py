"""The DeltaProduct operator as Pallas kernels: `solve`, `states` and `read`, and their gradients.

They follow the split of flash-linear-attention (arXiv:2406.06484): work within chunks is parallel
over chunks, only the state is sequential.
"""
