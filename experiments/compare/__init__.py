"""Evaluations side by side: what is read, which tables and curves are made of it, and how they are written."""
