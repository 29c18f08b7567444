r"""Train `model=tiny` from scratch: `python -m experiments.pretrain --output DIR`.

A Qwen2 of about 0.9 M parameters with a character-level tokenizer is trained on noisy worked solutions of the
arithmetic problems' training side:
- every step is wrong with probability `--noise`, and the solution continues with the wrong result;
- a difference among three or more numbers is read as a sum with probability `--misread`, while a difference of just two
  numbers is computed like any other step.
So the model solves sums with greedy decoding. It samples right answers often on short sums, less often on long ones and
hardly ever on the levels with differences. This leaves room for reinforcement and for demonstrations.

The same options and number of threads give bitwise identical weights.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import Tensor
from torch.optim import lr_scheduler
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

from experiments.grid import markdown_table
from upge.data.arithmetic import Arithmetic, draw, parse_level, question, side, worked_solution
from upge.data.splits import Problem

LARGEST = Arithmetic().largest
SLIPS = (-20, -10, -3, -2, -1, 1, 2, 3, 10, 20)
SPECIAL = ("<pad>", "<eos>", "<unk>")
MAX_LENGTH = 2048
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
CHUNKS = 4

README = """\
# model=tiny

A Qwen2 with {parameters:,} parameters (float32, tied embeddings). Its tokenizer has one token per ASCII character, and
one token per UTF-8 byte of any other character; special tokens: {special}.
It answers the problems of `data=arithmetic`, prompted with the problem and a line break, which its chat template adds.
It was trained from scratch, on the training side of these problems only, by

    {command}

in {minutes:.0f} minutes with --threads {threads}. The solutions it learned from contain deliberate errors, which leave
room for post-training: every step is wrong with probability {noise}, and a difference among three or more numbers is
read as a sum with probability {misread}. `python -m experiments.pretrain --help` lists the options.

Accuracy on {problems} problems of the evaluation side, greedy and with {samples} samples each at temperature 1:

{table}
"""


def build_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with one token per byte, so one per ASCII character; ids are fixed, the special tokens first.

    It is a byte-level BPE without merges, because `AutoTokenizer` reads the tokenizer of any Qwen2 as a byte-level BPE,
    whatever tokenizer.json contains. A vocabulary of plain characters would silently lose spaces and line breaks.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate((*SPECIAL, *alphabet))}, merges=[], chat_template=CHAT_TEMPLATE,
        pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH, padding_side="left",
    )  # fmt: skip


def build_model(tokenizer: Qwen2Tokenizer, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """A randomly initialized model with a head size of 32, which vLLM's attention on CPU supports."""
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True, bos_token_id=None, dtype="float32", **tokens,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(**tokens)
    return model


def noisy_step(rng: random.Random, noise: float, misread: float) -> Callable[[int, int], int]:
    """A step that reads a difference as a sum with probability `misread` and is wrong with probability `noise`."""

    def step(total: int, term: int) -> int:
        result = total + (abs(term) if term < 0 and rng.random() < misread else term)
        return result + (rng.choice(SLIPS) if rng.random() < noise else 0)

    return step


def mixture(longest: int) -> dict[str, float]:
    """Level → share of the pre-training problems: sums of 2 to `longest` numbers, differences among one fewer."""
    return {
        **{f"{n} numbers": 0.8 / (longest - 1) for n in range(2, longest + 1)},
        "2 mixed": 0.12,
        **{f"{n} mixed": 0.08 / (longest - 3) for n in range(3, longest)},
    }


def corpus(seed: int, noise: float, misread: float, longest: int = 6) -> Iterator[tuple[str, str]]:
    """Endless pairs of prompt and noisy solution, all from the training side."""
    rng, shares = random.Random(f"pretraining/{seed}"), mixture(longest)
    while True:
        level = rng.choices(tuple(shares), tuple(shares.values()))[0]
        terms = draw(rng, level, LARGEST)
        if side(terms) == "train":
            misreads = misread if parse_level(level)[0] > 2 else 0.0
            yield question(terms), worked_solution(terms, noisy_step(rng, noise, misreads))


def batch_loss(model: Qwen2ForCausalLM, rows: Sequence[tuple[Tensor, int]], tokens: int) -> Tensor:
    """Negative log-likelihood of the responses of `rows` (token ids, length of the prompt), divided by `tokens`.

    Padding is on the right, where causal attention ignores it, so no attention mask is needed.
    """
    ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
    labels = torch.full_like(ids, -100)
    for i, (row, start) in enumerate(rows):
        labels[i, start : len(row)] = row[start:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens


def train(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, options: argparse.Namespace) -> None:
    """Train with AdamW, warm-up and cosine decay, and save a loadable model at every checkpoint."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, min(100, options.steps // 10))
    rise = lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, max(1, options.steps - warmup), 0.02 * options.lr)
    schedule = lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
    texts, start = corpus(options.seed, options.noise, options.misread, options.longest), time.monotonic()
    for step in range(1, options.steps + 1):
        rows = []
        for prompt, solution in (next(texts) for _ in range(options.batch)):
            head = tokenizer.encode(prompt + "\n")
            rows.append((torch.tensor([*head, *tokenizer.encode(solution), tokenizer.eos_token_id]), len(head)))
        rows.sort(key=lambda row: len(row[0]))
        tokens, total = sum(len(ids) - prompt for ids, prompt in rows), 0.0
        size = -(-len(rows) // CHUNKS)
        for chunk in (rows[i : i + size] for i in range(0, len(rows), size)):
            loss = batch_loss(model, chunk, tokens)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % options.log_every == 0 or step == options.steps:
            print(f"step {step}/{options.steps}  loss {total:.4f}  {time.monotonic() - start:.0f} s", flush=True)
        if step % options.checkpoint_every == 0 or step == options.steps:
            model.save_pretrained(options.output)
            tokenizer.save_pretrained(options.output, save_jinja_files=False)


def generate(
    model: Qwen2ForCausalLM, tokenizer: Any, prompts: Sequence[str], tokens: int = 72, **sampling: Any
) -> list[str]:
    """Generate responses of at most `tokens` tokens to the prompts, in their order."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses = [""] * len(prompts)
    for rows in (order[i : i + 256] for i in range(0, len(order), 256)):
        inputs = tokenizer([prompts[i] + "\n" for i in rows], return_tensors="pt", padding=True)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=tokens, top_k=0, top_p=1.0, **sampling)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(rows, texts, strict=True):
            responses[i] = text
    return responses


def is_right(response: str, problem: Problem) -> bool:
    """Whether the last boxed number is the answer."""
    boxed = re.findall(r"\\boxed\{(-?\d+)\}", response)
    return bool(boxed) and boxed[-1] == problem.answer


def accuracy_table(
    model: Qwen2ForCausalLM, tokenizer: Any, problems: Sequence[Problem], samples: int, tokens: int
) -> str:
    """A Markdown table of the shares of solved problems on each level: greedy, mean over samples, any of them."""
    model.eval()
    set_seed(0)
    prompts = [p.prompt for p in problems]
    greedy = generate(model, tokenizer, prompts, tokens, do_sample=False)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    sampled = generate(model, tokenizer, repeated, tokens, do_sample=True, temperature=1.0)
    by_level: dict[str, list[tuple[int, int, int]]] = {}
    for i, problem in enumerate(problems):
        hits = [is_right(text, problem) for text in sampled[i * samples : (i + 1) * samples]]
        by_level.setdefault(str(problem.level), []).append((is_right(greedy[i], problem), sum(hits), any(hits)))
    rows = []
    for level, hits_of_problems in by_level.items():
        n, (first, all_samples, some) = len(hits_of_problems), map(sum, zip(*hits_of_problems, strict=True))
        rows.append([level, *(f"{share:.2f}" for share in (first / n, all_samples / (samples * n), some / n))])
    return markdown_table(["level", "greedy", f"mean@{samples}", f"pass@{samples}"], rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(prog="python -m experiments.pretrain", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; new or empty")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the problems and the mistakes")
    parser.add_argument("--steps", type=int, default=2000, help="number of updates")
    parser.add_argument("--batch", type=int, default=64, help="problems per update")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--noise", type=float, default=0.2, help="probability that a step is wrong")
    parser.add_argument("--misread", type=float, default=0.93, help="probability that a difference is read as a sum")
    parser.add_argument("--longest", type=int, default=6, help="numbers of the longest sums, from 4 to 9")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; other numbers change the rounding")
    parser.add_argument("--log-every", type=int, default=100, help="log every N updates")
    parser.add_argument("--checkpoint-every", type=int, default=500, help="save a checkpoint every N updates")
    parser.add_argument("--problems", type=int, default=512, help="problems for the final evaluation; 0 = none")
    parser.add_argument("--samples", type=int, default=8, help="samples of each problem in the evaluation")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "layers", "threads", "log_every", "checkpoint_every", "samples"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: found {getattr(options, name)}; give at least 1")
    for name in ("noise", "misread"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name}: found {getattr(options, name)}; give a probability from 0 to 1")
    if not 4 <= options.longest <= 9:
        parser.error(f"--longest: found {options.longest}; give a number from 4 to 9")
    if options.hidden < 32 or options.hidden % 32:
        parser.error(f"--hidden: found {options.hidden}; give a multiple of 32, the size of a head")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output: {options.output} is a file; give a folder")
    if options.output.is_dir() and any(options.output.iterdir()) and not options.force:
        parser.error(f"--output: {options.output} is not empty; give a new folder, or --force to write into this one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, evaluate and write the model with a README; return the exit code, 2 for a wrong option."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    set_seed(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.hidden, options.layers)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    start = time.monotonic()
    train(model, tokenizer, options)
    minutes = (time.monotonic() - start) / 60
    table = "(not measured)"
    if options.problems:
        levels = tuple(level for level in mixture(options.longest) if level != "2 mixed")
        problems = Arithmetic(levels, evaluation_size=options.problems).load().evaluation
        # A step of a solution has at most twelve characters.
        table = accuracy_table(model, tokenizer, problems, options.samples, 12 * options.longest)
        print(table)
    command = ["python", "-m", "experiments.pretrain", *(sys.argv[1:] if arguments is None else arguments)]
    fields = {**vars(options), "parameters": model.num_parameters(), "special": ", ".join(f"`{s}`" for s in SPECIAL)}
    text = README.format(**fields, command=shlex.join(command), minutes=minutes, table=table)
    (options.output / "README.md").write_text(text)
    print(f"written to {options.output} after {minutes:.1f} minutes of training")
    return 0


if __name__ == "__main__":
    sys.exit(main())
