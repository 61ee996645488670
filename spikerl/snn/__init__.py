"""Spiking neurons, encoders, decoders and the layers between them."""
