"""Switches every fault on, one after the other, and records which of the project's checks notice it."""
