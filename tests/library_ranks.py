"""Run by torchrun from test_library_trl.py: the trainers of docs/library.md on two processes.

usage: library_ranks.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

import algorithms
from tests import library
from tests.library import TINY
from tests.upge.test_library import ROLLOUTS, encoded
from tests.upge.test_library_trl import PROMPTS, by_turns, exact

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0,
    "save_strategy": "no", "bf16": False, "use_cpu": True,
}  # fmt: skip


def compared(trainer: Any, seen: list[Any]) -> float:
    """The difference between the gradient of all processes and that of upge's trainer on their trajectories."""
    with library.recorded() as steps:
        trainer.train()
    return library.difference(*library.gradients(steps, 0, trainer, gather_object(seen)))


def main(output: Path) -> None:
    library.import_trl()
    from trl import GRPOConfig

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    algorithm, differences, seen = algorithms.load("dapo"), {}, []
    kind = library.recording(library.trainer_class("my_trainer"), seen, algorithm=algorithm)
    arguments = TrainingArguments(str(output / "trainer"), remove_unused_columns=False, **SETTINGS)
    data = Dataset.from_list([encoded(tokenizer, *rollout) for rollout in ROLLOUTS])
    trainer = kind(library.double(), arguments, DataCollatorForSeq2Seq(tokenizer), data)
    differences["transformers"] = compared(trainer, seen)

    seen = []
    head = {"_get_per_token_logps_and_entropies": exact}
    kind = library.recording(library.trainer_class("my_grpo"), seen, algorithm=algorithm, **head)
    arguments = GRPOConfig(str(output / "trl"), num_generations=4, max_completion_length=40, **SETTINGS)
    trainer = kind(library.double(), by_turns, arguments, PROMPTS, processing_class=tokenizer)
    differences["trl"] = compared(trainer, seen)
    if trainer.accelerator.is_main_process:
        (output / "differences.json").write_text(json.dumps(differences))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
