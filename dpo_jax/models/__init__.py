"""Decoders as pure functions of a parameter tree."""
