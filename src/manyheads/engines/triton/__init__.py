"""Triton kernels of the engines. Imported only where a kernel is asked for, since Triton is slow to import."""
