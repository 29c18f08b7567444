"""Optional packages: which extra installs each, and the message that names a missing one."""

from __future__ import annotations

import sys
from types import TracebackType

#: Import name of an optional package → the arguments of `pip install`.
INSTALL = {
    **dict.fromkeys(("accelerate", "deepspeed", "peft", "safetensors", "tqdm", "transformers"), "'upge[train]'"),
    **dict.fromkeys(("huggingface_hub", "psutil", "tokenizers"), "'upge[train]'"),
    **dict.fromkeys(("math_verify", "latex2sympy2_extended"), "'upge[verify]'"),
    **dict.fromkeys(("jinja2", "matplotlib", "numpy", "rich", "scipy"), "'upge[report]'"),
    "sympy": "'upge[theory]'",
    **dict.fromkeys(("datasets", "pyarrow", "reasoning_gym"), "'upge[data]'"),
    **dict.fromkeys(("gguf", "filelock"), "'upge[gguf]'"),
    "vllm": "'upge[vllm]'",
    "trl": "trl",
    "liger_kernel": "liger-kernel",
    "tensorboard": "tensorboard",
}


def explanation(error: BaseException | None) -> str | None:
    """What to install, if the error or one that it was raised from is a missing optional package; else None."""
    while error is not None:
        # With a dot it is a module that another version of an installed package has; then the traceback helps more.
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if package in INSTALL:
            return f"the package {package.replace('_', '-')} is not installed; run `pip install {INSTALL[package]}`"
        error = error.__cause__
    return None


def explain_missing() -> None:
    """Lets this process end with a message and exit code 2 when an optional package is missing."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        message = explanation(error)
        if message is None:
            before(kind, error, traceback)
            return
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(2)

    sys.excepthook = hook
