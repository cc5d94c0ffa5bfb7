"""Reward functions for the tests, good and bad."""

import os
import time

import numpy as np

NOT_A_FUNCTION = 3


def length(problem, completion_text, answer, **info):
    return len(completion_text)


def everything(problem, completion_text, answer, id, level, **info):
    assert isinstance(problem, str) and isinstance(completion_text, str) and isinstance(answer, str)
    print("a print must not disturb", problem)
    return float(f"{level}.{len(info)}") if problem == "P" and answer == "A" and id == "p0" else -1.0


def by_text(problem, completion_text, answer, **info):
    """What it does is what the completion says."""
    action = completion_text
    if action == "none":
        return None
    if action == "nan":
        return float("nan")
    if action == "inf":
        return float("inf")
    if action == "list":
        return [1.0]
    if action.startswith("numpy"):
        return {"numpy.true": np.bool_(True), "numpy.half": np.float16(0.5), "numpy.one": np.array([1])}[action]
    if action == "text":
        return "1.0"
    if action == "raise":
        raise KeyError("missing thing")
    if action == "hang":
        time.sleep(1e6)
    if action == "exit":
        os._exit(0)
    if action == "leave":
        raise SystemExit(2)
    if action == "true":
        return True
    return float(action)


def named(problem, completion_text, answer, **info):
    """Named rewards, as the completion says: "a=1 b=0.5"."""
    return {name: float(value) for name, _, value in (p.partition("=") for p in completion_text.split())}


def needs_no_info(problem, completion_text, answer):
    return 1.0
