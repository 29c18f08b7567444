"""The thread between the callers of a `VerifierPool` and its worker processes."""

from __future__ import annotations

import itertools
import math
import os
import select
import socket
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from upge.verify.base import Verdict, VerifierError, printable, shortened
from upge.verify.messages import Message, ProtocolError
from upge.verify.processes import START_LIMIT, Settings, Task, Team, Worker

Outcome = Verdict | tuple[Verdict, ...]
"""The verdict on a task; if its verifier compares responses, the verdicts on all of them."""

START_ATTEMPTS = 3
"""How many times in a row, per worker, workers may die before they start an item."""
CLOSING = 15.0
"""The maximum number of seconds that `close` waits for the thread to end its processes."""


@dataclass(eq=False)
class Job:
    """A task and the futures of its outcome."""

    task: Task
    futures: list[Future[Any]] = field(default_factory=list)

    @property
    def is_wanted(self) -> bool:
        """Whether any of its futures is not cancelled."""
        return not all(future.cancelled() for future in self.futures)


class Dispatcher:
    """Passes tasks to the workers and their verdicts to futures, in a separate thread.

    Only that thread uses the processes and the jobs. Callers put tasks into an inbox and wake the thread. This takes no
    lock, so neither an interrupted caller nor a pool that is garbage-collected at any moment can leave a lock held. The
    thread is a daemon. `close` ends it; `VerifierPool` calls `close` when it is collected or the interpreter exits. A
    fork of the process does not have the thread, so `submit` raises an error there and `close` does nothing.

    Raises:
        OSError: processes cannot be started.
    """

    def __init__(self, settings: Settings) -> None:
        self._time_limit, self._ranges, self._owner = settings.time_limit, settings.ranges, os.getpid()
        self._team, self._numbers = Team(settings), itertools.count(1)
        self._inbox: deque[tuple[Task, Future[Any]]] = deque()
        self._jobs: dict[Task, Job] = {}
        self._queue: deque[Job] = deque()
        self._failed_starts = 0
        self._is_closing, self._is_over = False, False
        self._failure: RuntimeError | None = None
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="verifier-pool", daemon=True)
        self._thread.start()

    # --- in the callers' threads ---

    def submit(self, task: Task) -> Future[Any]:
        """A future of the `Outcome` of a task: several verdicts if the task has several `responses`.

        Raises:
            RuntimeError: as for `require_open`.
        """
        self.require_open()
        future: Future[Any] = Future()
        future.add_done_callback(self._notice)
        self._inbox.append((task, future))
        self.wake()
        if self._is_over:  # the thread may have ended before it saw the task
            self.require_open()
        return future

    def require_open(self) -> None:
        """Do nothing if tasks can be submitted.

        Raises:
            RuntimeError: the pool is closed, has failed, or belongs to another process.
        """
        if os.getpid() != self._owner:
            raise RuntimeError("this VerifierPool belongs to the process that made it; make a new one in this process")
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure
        if self._is_closing or self._is_over:
            raise RuntimeError("this VerifierPool is closed; make a new one")

    def wake(self) -> None:
        """Make the thread check its inbox, cancelled futures, and whether it is to end."""
        try:
            self._bell.send(b"!")
        except OSError:  # enough signals are already pending, or the thread has ended
            pass

    def _notice(self, future: Future[Any]) -> None:
        """Wake the thread if a future was cancelled, because its worker may now be free."""
        if future.cancelled():
            self.wake()

    def close(self) -> None:
        """End the processes and cancel pending futures. Do nothing in a fork of the process."""
        if os.getpid() != self._owner:
            return
        self._is_closing = True
        self.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSING)

    # --- in the dispatcher's thread ---

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._take_in()
                self._give_up_unwanted()
                self._hand_out()
                self._listen()
        except VerifierError as error:  # passed on to all pending and later callers
            self._failure = error
        except BaseException as error:
            self._failure = RuntimeError(str(error) or repr(error))
            self._failure.__cause__ = error
        finally:
            self._is_over = True
            self._take_in()
            for job in list(self._jobs.values()):
                self._end(job, self._failure)
            self._team.stop()
            self._bell.close()
            self._ear.close()

    def _take_in(self) -> None:
        """Turn the inbox into jobs. A task that already has a job adds its future to that job."""
        while self._inbox:
            task, future = self._inbox.popleft()
            job = self._jobs.get(task)
            if job is None:
                job = self._jobs[task] = Job(task)
                self._queue.append(job)
            job.futures.append(future)

    def _give_up_unwanted(self) -> None:
        """Free workers whose futures are all cancelled."""
        for worker in list(self._team.workers):
            if worker.job is not None and not worker.job.is_wanted:
                self._end(worker.job)
                self._team.replace(worker)

    def _hand_out(self) -> None:
        for worker in list(self._team.workers):
            while worker.is_idle and self._queue:
                job = self._queue.popleft()
                if not job.is_wanted:
                    self._end(job)
                elif not worker.take_up(job, job.task, next(self._numbers)):
                    self._queue.appendleft(job)
                    self._bury(worker)
                    break

    def _listen(self) -> None:
        """Wait for a worker, a caller or a deadline."""
        workers = list(self._team.workers)
        first = min(worker.deadline for worker in workers)
        patience = None if first == float("inf") else max(0.0, first - time.monotonic())
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        if self._team.output is not None:
            poll.register(self._team.output, select.POLLIN)
        for worker in workers:
            poll.register(worker.channel, select.POLLIN | (select.POLLOUT if worker.channel.has_unsent else 0))
        events = dict(poll.poll(None if patience is None else math.ceil(1000 * patience)))
        if self._ear.fileno() in events:
            self._ear.recv(4096)  # all signals since the last time
        if self._team.output in events:
            self._team.pass_on()
        now = time.monotonic()
        for worker in workers:
            event = events.get(worker.channel.fileno(), 0)
            if event:
                self._exchange(worker, event)
            elif now >= worker.deadline:
                self._expire(worker)

    def _exchange(self, worker: Worker, event: int) -> None:
        """Send and receive what can be sent and received at once, or handle the worker's death.

        `event` is the mask of `select.poll`.
        """
        try:
            if event & select.POLLOUT:
                worker.channel.flush()
            if event & ~select.POLLOUT:
                for message in worker.channel.read():
                    self._accept(worker, message)
        except (EOFError, OSError):
            self._bury(worker)
        except ProtocolError as error:
            self._bury(worker, f"the worker process was replaced, because it sent {error}")

    def _accept(self, worker: Worker, message: Message) -> None:
        """Handle one message of a worker.

        Raises:
            ProtocolError: the message is out of turn. Code that a response contains may write to the socket.
            VerifierError: a verifier cannot be loaded.
        """
        match message:
            case ["ready", int(pid)] if worker.pid is None:
                worker.pid, worker.deadline = pid, float("inf")
            case ["failed", str(name), str(reason)] if worker.pid is None:
                raise VerifierError(
                    f"a verification process could not load '{name}': {printable(reason)}; the processes have a "
                    "limited environment (verify.environment) and no network unless verify.network=true"
                )
            case ["started", int(number)] if worker.expects(number) and not worker.has_started:
                worker.has_started, worker.deadline = True, time.monotonic() + self._time_limit
                self._failed_starts = 0
            case ["done", int(number), *outcome] if worker.expects(number) and worker.has_started:
                result = self._outcome(worker.job.task, outcome)
                job, worker.job, worker.deadline = worker.job, None, float("inf")
                self._answer(job, result)
            case _:
                raise ProtocolError("a message out of turn")

    def _outcome(self, task: Task, message: Message) -> Outcome:
        """The outcome of a task from a worker's message; raises ProtocolError if it is not one."""
        low, high = self._ranges.get(task.verifier, (0.0, 1.0))
        match message:
            case [list(rewards), "ok" | "error" as status, str(detail), extracted, str(trace), float(seconds)] if (
                len(rewards) == (max(task.responses, 1) if status == "ok" else 0)
                and all(isinstance(reward, int | float) and low <= reward <= high for reward in rewards)
                and isinstance(extracted, str | None)
            ):
                # The worker measures the time, because this thread may read the message late.
                if seconds > self._time_limit:
                    return self._timeout(task)
                if status == "error":
                    return self._failed(task, status, printable(detail), extracted, printable(trace))
                verdicts = tuple(Verdict(float(reward), status, printable(detail), extracted) for reward in rewards)
                return verdicts if task.responses else verdicts[0]
        raise ProtocolError("something other than a verdict")

    def _failed(self, task: Task, status: str, detail: str, extracted: str | None = None, trace: str = "") -> Outcome:
        """The outcome of a failure. Its reward is the smallest, so that failures are never rewarded."""
        low, _ = self._ranges.get(task.verifier, (0.0, 1.0))
        verdict = Verdict(low, status, detail, extracted, trace)
        return (verdict,) * task.responses if task.responses else verdict

    def _bury(self, worker: Worker, reason: str = "") -> None:
        """Replace a worker that has died or must be killed.

        If it had started its item, the item ends in an error; otherwise the item is queued again.

        Args:
            worker: the worker; killed if it is alive.
            reason: why it must be replaced; empty if it has died.
        """
        ending, words = self._team.replace(worker)
        if worker.job is not None and worker.has_started:
            self._answer(worker.job, self._failed(worker.job.task, "error", reason or ending))
            return
        if worker.job is not None:
            self._queue.appendleft(worker.job)
        self._failed_starts += 1
        if self._failed_starts >= START_ATTEMPTS * len(self._team.workers):
            raise VerifierError(
                f"verification processes for {self._team.title} end before they start: {reason or ending}{words}"
            )

    def _expire(self, worker: Worker) -> None:
        """Replace a worker that has exceeded its deadline."""
        if worker.pid is None:
            raise VerifierError(
                f"a verification process for {self._team.title} was not ready after {START_LIMIT:g} s; check what the "
                "import of its module waits for, and whether the machine is overloaded"
            )
        if not worker.has_started:
            self._bury(worker, f"the worker process did not start an item within {START_LIMIT:g} s")
            return
        self._team.replace(worker)
        self._answer(worker.job, self._timeout(worker.job.task))

    def _timeout(self, task: Task) -> Outcome:
        return self._failed(task, "timeout", f"not done after {self._time_limit:g} s")

    def _answer(self, job: Job, outcome: Outcome) -> None:
        if isinstance(outcome, Verdict):
            extracted = job.task.text if job.task.is_extracted else outcome.extracted
            outcome = replace(outcome, extracted=shortened(extracted))
        self._end(job, outcome)

    def _end(self, job: Job, outcome: Outcome | RuntimeError | None = None) -> None:
        """Set the outcome of a job's futures; None cancels them."""
        del self._jobs[job.task]
        for future in job.futures:
            if outcome is None:
                future.cancel()
            # Returns False if the future was cancelled; afterwards it can no longer be cancelled.
            if future.set_running_or_notify_cancel():
                if isinstance(outcome, RuntimeError):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
