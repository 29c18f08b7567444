"""Verifiers of a user's own, good and bad ones, for the tests of `upge.verify`."""

from __future__ import annotations

import math
import os
import time


def length(response, answer, prompt=None):
    return min(1.0, len(response) / 10)


def prompted(response, answer, prompt):
    return float(prompt == "yes")


def crash(response, answer, prompt=None):
    if response == "exit":
        os._exit(3)
    if response == "kill":
        os.kill(os.getpid(), 9)
    if response == "raise":
        raise KeyError("no such thing")
    if response == "leave":
        raise SystemExit(4)
    return 1.0


def odd(response, answer, prompt=None):
    odd = {"nan": math.nan, "inf": math.inf, "two": 2, "text": "1", "none": None}
    return {**odd, "true": True, "half": 0.5}[response]


def slow(response, answer, prompt=None):
    time.sleep(float(response))
    return 1.0


def counted(response, answer, prompt=None):
    with open(answer, "a") as file:
        file.write(response + "\n")
    return float(response == "yes")


def memory(response, answer, prompt=None):
    return float(len(bytearray(int(response))) > 0)


class Strict:
    def __init__(self):
        self.calls = 0

    def __call__(self, response, answer, prompt=None):
        self.calls += 1
        return float(response == answer)


class NeedsMore:
    def __init__(self, model):
        pass


def too_few(text):
    return 1.0


number = 5


def reads_upge(response, answer, prompt=None):
    import upge

    return float(upge.Trajectories.__name__ == response and upge.verify.last_boxed(answer) == "1")


def bomb(response, answer, prompt=None):
    if response == "hang":
        while True:
            pass
    if response == "memory":
        return float(len(bytearray(2**34)) > 0)
    return 1.0


class Telling:
    def extract(self, response):
        return {"none": None, "long": "x" * 5000, "half": "a\ud800b"}.get(response, response.upper())

    def __call__(self, response, answer, prompt=None):
        return float(response == answer)
