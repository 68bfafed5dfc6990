"""GPU kernels on Pallas' Mosaic GPU backend: arrays in, arrays out.

Nothing here knows of fdq's modules, of Flax or of checkpoints. Each file holds a kernel and, beside
it, its reference in plain `jax.numpy`. The same sources compile from sm_75 (T4) to sm_120
(RTX PRO 6000) and run in Mosaic's interpreter on a CPU.
"""
