"""These tests need the CUDA packages and no GPU: `make test-gpu-stack`. With other packages nothing is collected."""

from __future__ import annotations

import importlib.util

import torch

if torch.version.cuda is None or importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
