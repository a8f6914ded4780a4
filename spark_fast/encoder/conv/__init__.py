"""The convolution of packed patches: window geometry, the algorithms to choose from, CPU and Triton kernels."""
