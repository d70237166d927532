"""The only package that imports megatron.core and Transformer Engine: devices, layers, layouts, optimizer."""
