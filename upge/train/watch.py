"""Watches a rank's launcher and the other ranks in a thread, even while the rank itself waits in a collective."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable

import psutil
import torch.distributed as dist

from upge.train.distributed import World
from upge.train.launcher import has_launcher
from upge.train.stopping import FAILED, Ending, StopSignals

#: Seconds between two checks, and the number of checks in a row in which a rank or the store must be missing.
_INTERVAL, _PATIENCE = 0.5, 3
#: Seconds that a rank whose collectives fail waits for its watch to say why.
_LONGEST_WAIT = 60.0
_STOP, _FAILED, _TOLD = "upge/stop", "upge/failed", "upge/told"


class Watch:
    """A thread of each rank that passes on signals, and ends the process when the launcher or another rank has ended.

    Without it, a rank that waits for one that was killed may wait until its collective times out.

    Args:
        world: the run's processes; all ranks create a watch at the same time.
        stop: notes the signals of this rank and receives those of the others.
        lost: called on one rank with the ending, before its process exits.
    """

    def __init__(self, world: World, stop: StopSignals, lost: Callable[[Ending], None]) -> None:
        self._rank, self._stop, self._lost = world.rank, stop, lost
        self._parent, self._launched, self._over = os.getppid(), has_launcher(), threading.Event()
        places = world.gather((_machine(), os.getpid()))
        mates = {rank: pid for rank, (machine, pid) in enumerate(places) if machine == places[world.rank][0]}
        self._mates = {rank: psutil.Process(pid) for rank, pid in mates.items() if rank != world.rank}
        self._store = dist.distributed_c10d._get_default_store() if world.size > 1 else None
        if world.size > 1 or self._launched:
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def wait(self) -> None:
        """Wait for the watch to notice that another rank has ended, which ends this process.

        On a busy machine, the watch may take longer than its intervals.
        """
        if self._store is None:
            return
        self._over.wait(2 * _PATIENCE * _INTERVAL)
        until = time.monotonic() + _LONGEST_WAIT
        while any(map(_has_ended, self._mates.values())) and time.monotonic() < until:
            if self._over.wait(_INTERVAL):
                return

    def end(self) -> None:
        """End the watch. All ranks call this after a barrier and before any of them exits."""
        self._over.set()

    def fail(self, ending: Ending) -> bool:
        """End the other ranks and give them the reason; return whether this rank is the first to do so."""
        self._over.set()
        return self._tell(Ending(ending.code, f"rank {self._rank}: {ending.reason}"))

    def _run(self) -> None:
        missing = silent = 0
        while not self._over.wait(_INTERVAL):
            ending = None
            try:
                ending, silent = self._exchange(), 0
            except RuntimeError:
                silent += 1
            gone = next((rank for rank, process in self._mates.items() if _has_ended(process)), None)
            missing = 0 if gone is None else missing + 1
            if self._launched and os.getppid() != self._parent or silent >= _PATIENCE:
                ending = Ending(FAILED, "the launcher has ended; all ranks end")
            elif ending is None and missing >= _PATIENCE and gone is not None:
                process = self._mates[gone].pid
                ending = Ending(FAILED, f"rank {gone} (process {process}) was killed or crashed; all ranks end")
            if ending is not None and not self._over.is_set():
                if self._tell(ending):
                    self._lost(ending)
                os._exit(ending.code)

    def _exchange(self) -> Ending | None:
        """Pass on signals to and from the other ranks; return the ending of one that failed, if any."""
        if self._store is None:
            return None
        if self._stop.number:
            self._store.set(_STOP, str(self._stop.number))
        elif self._store.check([_STOP]):
            self._stop.note(int(self._store.get(_STOP)))
        return Ending(*json.loads(self._store.get(_FAILED))) if self._store.check([_FAILED]) else None

    def _tell(self, ending: Ending) -> bool:
        """Pass an ending on to the other ranks; return whether this rank is the first to do so."""
        if self._store is None:
            return True
        try:
            is_first = self._store.add(_TOLD, 1) == 1
            if is_first:
                self._store.set(_FAILED, json.dumps(ending))
        except RuntimeError:  # the launcher's store has ended with it
            return True
        return is_first


def _machine() -> tuple[str, str]:
    """The name of the machine or container in which a process id is unique."""
    try:
        return socket.gethostname(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname(), ""


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
