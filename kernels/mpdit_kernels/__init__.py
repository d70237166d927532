"""Fused operations of diffusion transformers: one pass over memory forward, one backward. Knows nothing of mpdit.

    modulate.py   layer norm, modulation, gate and residual    heads.py   RMSNorm of queries and keys, with rotation
    reference.py  what each of them means, in plain PyTorch    fused/     the same in Triton
    switch.py     which of the two runs                        aot.py     what the compiler makes of them, without a GPU
    linear.py     fp32 products on a CPU

There is no optimizer here. AdamW leaves a kernel of our own nothing to save: it reads a weight, its gradient and two
moments and writes three of them, 28 bytes a parameter in fp32, and ``torch.optim.AdamW(fused=True)`` does that in one
pass, with one multi-tensor launch for each parameter group. lr, weight_decay and eps are arguments of that launch. muP
gives a network a handful of different values however deep it is, so a value of each tensor's own costs a handful of
launches, microseconds beside the 8 ms that the memory of an H100 takes for a billion parameters.
"""
