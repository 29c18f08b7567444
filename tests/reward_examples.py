"""Verifiers that ask for more than the answer, for the tests of rewards."""

from __future__ import annotations

import time


def everything(response, answer, prompt, row, tokens, is_truncated):
    return float((response, answer, prompt, tokens, is_truncated) == ("r", "a", "p", 3, True) and row["level"] == 2)


def no_answer(response, *, row=None, **more):
    assert not more
    return float(response == row["word"])


def plain(response, answer, prompt=None):
    return float(answer in response)


class Signed:
    minimum, maximum = -1, 2

    def __call__(self, response):
        return {"hang": lambda: time.sleep(3600)}.get(response, lambda: float(response))()


def shorter(responses, tokens):
    return [float(count == min(tokens)) for count in tokens]


def ranks(responses, answer, prompt, row):
    best = sorted(responses)
    return [best.index(response) / len(best) for response in responses]


ranks.minimum, ranks.maximum = -0.5, 1.0


def bad_list(responses):
    return {"short": [1.0], "high": [2.0] * len(responses), "text": "1" * len(responses), "none": None}[responses[0]]


def too_long(response, tokens):
    return float(tokens > 4)


def misspelled(response, anwser, row):
    return 1.0


def both(response, responses):
    return 1.0


def upside_down(response):
    return 1.0


upside_down.minimum = 1.0
