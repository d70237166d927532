"""Fused operations of diffusion transformers: one pass over memory forward, one backward. Knows nothing of mpdit.

    modulate.py   layer norm, modulation, gate and residual    heads.py   RMSNorm of queries and keys, with rotation
    reference.py  what each of them means, in plain PyTorch    fused/     the same in Triton
    switch.py     which of the two runs                        aot.py     what the compiler makes of them, without a GPU

There is no optimizer here. AdamW has no reuse for a fused kernel to find: it reads gradient, weight and two moments and
writes three of them, 28 bytes a parameter in fp32, and ``torch.optim.AdamW(fused=True)`` does just that in one
multi-tensor launch for each parameter group. A group's lr, weight_decay and eps are arguments of the launch, so muP's
per-tensor values cost as many launches as there are different values (mpdit merges equal ones into one group: about ten
for a network of any depth), a few microseconds each beside the milliseconds that a billion parameters take.
"""
