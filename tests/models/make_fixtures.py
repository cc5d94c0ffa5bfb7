"""Writes fixtures/parity.npz: logits of transformers on the models of hf_cases.py, so that parity is checked
where torch is not installed. Needs torch and transformers:

    python -m tests.models.make_fixtures
"""

import pathlib
import tempfile

import numpy as np

from tests.models.hf_cases import CASES, hf_tensors, write_model

PATH = pathlib.Path(__file__).parent / "fixtures" / "parity.npz"
LENGTH = 96  # past original_max_position_embeddings of the llama3 cases
POSITIONS = (0, 1, 17, 50, 95)


def tokens(name: str) -> np.ndarray:
    """int64 [1, LENGTH]: the input of a case."""
    seed = sorted(CASES).index(name)
    return np.random.RandomState(seed).randint(CASES[name]["vocab_size"], size=(1, LENGTH))


def main():
    import torch
    from transformers import AutoModelForCausalLM

    logits = {}
    for name, hf in CASES.items():
        with tempfile.TemporaryDirectory() as directory:
            write_model(pathlib.Path(directory), hf, hf_tensors(hf))
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.no_grad():
                out = model(torch.from_numpy(tokens(name))).logits
            logits[name] = out[0, list(POSITIONS)].numpy()
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **logits)
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
