"""TRL's GRPOTrainer on the work of `benchmarks/learner.py --task=step`, started by its --peers=trl.

    PYTHON_WITH_TRL benchmarks/trl_step.py MODEL STEPS CORES

Needs torch, transformers, trl and datasets; nothing of jaxrl. A Qwen3 with random weights and a tokenizer of one
word per id are made here, so nothing is downloaded. Prints one JSON line: seconds of each step after the first (CPU
seconds if CORES is 1), the share of them before the loss (sampling, rewards), and the process's peak memory.
"""

import json
import os
import resource
import sys
import tempfile
import time

MODEL, STEPS, CORES = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if CORES:
    os.environ["OMP_NUM_THREADS"] = str(CORES)
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from learner import BATCH, GROUP, PROMPT, RESPONSE, SHAPES, reward  # noqa: E402  (imports no jax)

clock = time.process_time if CORES == 1 else time.perf_counter


def model(shape: dict):
    torch.manual_seed(0)
    names = dict(num_layers="num_hidden_layers", num_heads="num_attention_heads", num_kv_heads="num_key_value_heads")
    config = transformers.Qwen3Config(
        **{names.get(k, k): v for k, v in shape.items()}, head_dim=64, rope_theta=1e6, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    return transformers.Qwen3ForCausalLM(config)


def words(vocab: int):
    """Token i is the word "i"; 0 is padding and 1 the end."""
    table = {str(i): i for i in range(2, vocab)} | {"<pad>": 0, "<end>": 1}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", padding_side="left")


class Trainer(trl.GRPOTrainer):
    """Notes when each step begins, when its loss begins, and when it ends."""

    marks: list[list[float]] = []

    def training_step(self, *args, **kwargs):
        self.marks.append([clock()])
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        self.marks[-1].append(clock())
        return super().compute_loss(*args, **kwargs)


class Ends(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Trainer.marks[-1].append(clock())


def main():
    torch.set_num_threads(CORES or os.cpu_count())
    rng, vocab = np.random.default_rng(0), SHAPES[MODEL]["vocab_size"]
    prompts = [" ".join(map(str, row)) for row in rng.integers(2, vocab, (BATCH, PROMPT))]
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", max_steps=STEPS + 1, learning_rate=1e-5, per_device_train_batch_size=BATCH,
            num_generations=GROUP, max_completion_length=RESPONSE, temperature=1.0, beta=0.0,
            gradient_checkpointing=False, generation_kwargs={"min_new_tokens": RESPONSE})
        trainer = Trainer(
            model=model(SHAPES[MODEL]), args=config, processing_class=words(vocab), callbacks=[Ends()],
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            reward_funcs=lambda completions, **_: [reward(text) for text in completions])
        trainer.train()
    seconds = [end - begin for begin, _, end in Trainer.marks[1:]]
    rollout = [loss - begin for begin, loss, _ in Trainer.marks[1:]]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(dict(engine="trl", model=MODEL, seconds=seconds, rollout=rollout, peak_rss_mib=round(peak),
                          trl=trl.__version__, torch=torch.__version__)), flush=True)


if __name__ == "__main__":
    main()
