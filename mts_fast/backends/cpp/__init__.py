"""Glue of the C++ and CUDA kernels of csrc: schemas, derivatives, what they cannot serve."""
