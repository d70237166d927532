"""The only room that imports megatron.core and Transformer Engine: devices, layers, layouts, optimizer, checkpoints."""
