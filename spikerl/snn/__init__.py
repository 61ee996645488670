"""Spiking neurons, encoders, decoders, and the kernels that run them."""
