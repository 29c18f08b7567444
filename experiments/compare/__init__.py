"""Compares evaluations: reads their folders, computes tables and curves, and writes them."""
