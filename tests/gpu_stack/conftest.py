"""Tests of the calls of the CUDA packages, without a GPU: `make test-gpu-stack`. Elsewhere nothing is collected."""

from __future__ import annotations

import importlib.util
import shutil

import torch

if torch.version.cuda is None or importlib.util.find_spec("vllm") is None or shutil.which("cc") is None:
    collect_ignore_glob = ["test_*.py"]
