"""Triton kernels and the functions that launch them, one op a file, and files of shared functions.

The launching functions take checked tensors of one device. They are imported when they first run,
since `import mts_fast` does not import triton.
"""
