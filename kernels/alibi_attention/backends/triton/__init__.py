"""Our Triton kernels: the bias from the slope in fp32, and an early exit past each head's horizon."""
