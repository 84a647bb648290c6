"""Glue of the Triton kernels: schemas, derivatives, what they cannot serve, how they launch."""
