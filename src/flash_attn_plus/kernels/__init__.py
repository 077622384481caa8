"""Triton kernels. Importing this package imports nothing; its modules need Triton."""
