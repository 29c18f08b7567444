"""Run by test_trains.py: short runs of the command line, each forked from a process that has imported everything.

usage: train_all.py FOLDER RUN ARGUMENT... [-- RUN ARGUMENT...]...

Each run leaves FOLDER/RUN; its output is in FOLDER/RUN.log, whose last line is the exit code. Importing takes longer
than training this little, so it is done once. An argument ranks=N starts a run on N ranks; interrupted=OTHER continues
a copy of another run as if that had stopped in its last step, of which it has a checkpoint of every step.
"""

from __future__ import annotations

import os

# Before torch is imported: a pool of threads would not survive the fork.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_MININTERVAL": "60", "DS_ACCELERATOR": "cpu"}

import gc
import importlib
import itertools
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

from tests.running import interrupt

#: Few prompts of few levels, of which the small model solves some: all gates open, all groups differ now and then.
SETTINGS = (
    "model=tiny",
    "steps=3",
    "prompts_per_step=6",
    "group_size=4",
    "data.train_size=48",
    "data.levels=[3 numbers,4 numbers,4 mixed]",
    "eval.every=-1",
    "rollout.engine=transformers",
    "rollout.max_response_tokens=96",
    "optimizer.micro_batch_tokens=512",
    "verify.workers=1",
    "log_rollouts=0",
)
#: What a run imports on its way.
MODULES = (
    *("experiments.run.__main__", "experiments.config", "experiments.run.prepare", "experiments.run.train"),
    *("tests.undrawn", "experiments.report.page", "experiments.grid", "upge.train.trainer", "upge.train.critic"),
    *("upge.rollout.transformers_engine", "upge.verify", "deepspeed", "transformers", "safetensors.torch"),
    *("transformers.models.qwen2.modeling_qwen2", "deepspeed.runtime.zero.muon.muon_optimizer", "rich.table", "tqdm"),
)
AT_ONCE = 2
#: Seconds for one run; several times what it takes where every core has other work.
LIMIT = 600


def child(folder: Path, name: str, arguments: list[str]) -> None:
    """Trains and ends this process."""
    log = os.open(folder / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        from experiments.run import __main__ as run

        code = run.main([*SETTINGS, *arguments, f"output={folder / name}"])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def value_of(key: str, arguments: list[str]) -> str | None:
    """The value of an argument key=value; None if there is none."""
    return next((a.removeprefix(f"{key}=") for a in arguments if a.startswith(f"{key}=")), None)


def start(folder: Path, name: str, arguments: list[str]) -> list[int]:
    """Forks a process for each rank of a run; returns their ids."""
    ranks, other = int(value_of("ranks", arguments) or 1), value_of("interrupted", arguments)
    arguments = [a for a in arguments if not a.startswith(("ranks=", "interrupted="))]
    if other is not None:
        interrupt(folder / other, folder / name)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    results = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= address | place if ranks > 1 else {}
            child(folder, name, arguments)
        results.append(pid)
    return results


def train(folder: Path, runs: dict[str, list[str]]) -> None:
    """Makes the runs, some at once; one that exceeds the limit, or one of whose ranks fails, is killed."""
    waiting, running = dict(runs), {}
    while waiting or running:
        while len(running) < AT_ONCE:
            unfinished = waiting.keys() | running.keys()
            name = next((n for n, a in waiting.items() if value_of("interrupted", a) not in unfinished), None)
            if name is None:
                break
            running[name] = (start(folder, name, waiting.pop(name)), time.monotonic(), [])
        for name, (pids, began, codes) in list(running.items()):
            for pid in list(pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    pids.remove(pid)
                    codes.append(os.waitstatus_to_exitcode(status))
            if not pids:
                with (folder / f"{name}.log").open("a") as log:
                    print(f"\n{time.monotonic() - began:.1f} s\n{next(filter(None, codes), 0)}", file=log)
                del running[name]
            elif any(codes) or time.monotonic() - began > LIMIT:
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def main(folder: Path, words: list[str]) -> None:
    for module in MODULES:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is imported stays: no child needs to look through it
    described = [list(group) for is_end, group in itertools.groupby(words, lambda word: word == "--") if not is_end]
    train(folder, {name: arguments for name, *arguments in described})
    gc.unfreeze()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
