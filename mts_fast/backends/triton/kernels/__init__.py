"""How, in Triton: one noun a file, each with its kernels and the function that launches them.

The functions take checked tensors of one device. They are imported when they are first run, since
`import mts_fast` does not bring triton.
"""
