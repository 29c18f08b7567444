"""What DeepSpeed's ZeRO-2 does with several micro-batches when its optimizer is on the CPU.

`python -m experiments.referee.offload [FOLDER]` runs updates of one process on gloo with DeepSpeed from FOLDER, or the
installed one, and prints how much of each micro-batch's gradient the update contains. The optimizer is torch's SGD with
a learning rate of 1, so the update is minus the gradient. The micro-batches' gradients are orthogonal, so that their
shares can be told apart.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

from experiments.referee.worker import MARK

#: (name, gradient_accumulation_steps, backward passes of an update). Where they differ, the boundary is set by hand.
RUNS = (
    ("2 micro-batches, gradient_accumulation_steps=2", 2, 2),
    ("4 micro-batches, gradient_accumulation_steps=4", 4, 4),
    ("2 backward passes, gradient_accumulation_steps=1", 1, 2),
    ("4 backward passes, gradient_accumulation_steps=1", 1, 4),
)


def settings(accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration: ZeRO-2 with the optimizer on the CPU."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }


def shares(deepspeed: Any, accumulation: int, passes: int) -> list[float]:
    """The share of each micro-batch's gradient in one update; in a sum over micro-batches each share is 1.

    Micro-batch i is the unit vector e_i, and the loss is the model's output, w·e_i: its gradient is e_i.
    """
    import torch

    model = torch.nn.Linear(passes, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(accumulation))
    for step, row in enumerate(torch.eye(passes)):
        if accumulation != passes:
            engine.set_gradient_accumulation_boundary(step == passes - 1)
        engine.backward(engine(row[None]).sum())
        engine.step()
    return (-engine.module.weight.detach().float().flatten() * accumulation).tolist()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the shares of every run as JSON."""
    folders = sys.argv[1:] if arguments is None else arguments
    sys.path[:0] = folders
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    import deepspeed

    # Otherwise DeepSpeed compiles a collective for several processes, which takes minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")
    rows = {}
    for name, accumulation, passes in RUNS:
        try:
            rows[name] = {"shares": [round(share, 6) + 0.0 for share in shares(deepspeed, accumulation, passes)]}
        except Exception as error:  # any version may refuse a setting
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(MARK + json.dumps({"version": deepspeed.__version__, "runs": rows}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
