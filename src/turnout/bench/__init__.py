"""Gated benchmarks against named peers: ratios from one run, never absolute claims from a noisy machine."""
