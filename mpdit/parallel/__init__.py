"""The only room that imports megatron.core: devices, layers, layouts, stages, optimizer, checkpoints."""
