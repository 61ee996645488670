"""Spiking neurons, encoders, decoders, and what they are made of."""
