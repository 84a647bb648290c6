"""Glue of the Triton kernels: schemas, derivatives, reasons why they cannot run, launches."""
