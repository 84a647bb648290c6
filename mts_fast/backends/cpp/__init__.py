"""Glue of the C++ and CUDA kernels of csrc: schemas, derivatives, reasons why they cannot run."""
