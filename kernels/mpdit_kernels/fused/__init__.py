"""The operations in Triton, as autograd functions. Imported only where the switch takes them."""
