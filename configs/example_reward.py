"""A user-defined reward: `--config.task.reward=configs.example_reward:numbers`."""


def numbers(problem: str, completion_text: str, answer: str, **info) -> float:
    """1 for the right answer as the last word, else up to 0.5 for the share of words that hold a digit.

    A reward that is not all zero for a model that cannot solve anything yet.
    """
    words = completion_text.split()
    if not words:
        return 0.0
    if words[-1].rstrip(".") == answer:
        return 1.0
    return 0.5 * sum(any(c.isdigit() for c in w) for w in words) / len(words)
