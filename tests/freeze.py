"""Imported last by the fork servers: keeps the garbage collector of their children from what is imported."""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
