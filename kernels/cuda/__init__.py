"""2:4 on sparse tensor cores in CUDA C++, compiled at run time and launched through CuPy on torch's tensors."""
