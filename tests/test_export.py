"""A run becomes a Hugging Face directory: transformers computes the same logits, tokens and chat prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import export
from jaxrl.errors import UserError
from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.model_source import load_model
from jaxrl.tasks import dial
from models.config import DecoderConfig, to_hf
from models.decoder import Decoder, init_params, logits
from models.tokenizers import load_tokenizer, vocab_tokenizer
from tests.shared import shared_path

PROMPT = "dial 7: a+5 b-6 ?"


def make_run(root, tokenizer, dtype=jnp.float32):
    config = DecoderConfig(
        tokenizer.vocab_size, 16, 24, 2, 2, 1, 8, qk_norm=True, tie_embeddings=True, model_type="qwen3"
    )
    home = root / "run" / "model"
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps(to_hf(config)))
    tokenizer.save(home)
    sampling = {"temperature": 0.6, "top_k": 0, "top_p": 0.95, "slots": 4}
    (root / "run" / "config.json").write_text(json.dumps({"sampling": sampling}))
    with Checkpointer(root / "run" / "checkpoints", keep_last=5) as saver:
        for step in (2, 4):
            params = init_params(config, jax.random.key(step), dtype)
            saver.save(step, {"params": params, "key": jax.random.key(0)}, {})
    return root / "run"


@pytest.fixture
def tokenizer():
    return load_tokenizer(shared_path("data", "tokenizers", "minimind"))


def test_transformers_computes_the_same_and_speaks_the_same(tmp_path, tokenizer, capsys):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run, out = make_run(tmp_path, tokenizer), tmp_path / "out"
    export.main(["export", str(run), str(out), "--step=2"])
    assert f"written to {out}: a qwen3 with " in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    config, params, ours = load_model(run, step=2)
    chat = [{"role": "user", "content": "What is 1+1?"}]
    ids = ours.apply_chat_template(chat)
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids and len(ids) > 8
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    hidden, _ = Decoder(config).apply({"params": params}, jnp.array([ids]), jnp.arange(len(ids))[None])
    np.testing.assert_allclose(logits(params, hidden)[0], expected, rtol=1e-4, atol=1e-6)
    g = model.generation_config
    assert (g.do_sample, g.temperature, g.top_k, g.top_p) == (True, 0.6, 0, 0.95)
    assert g.eos_token_id == (ours.eos_ids[0] if len(ours.eos_ids) == 1 else list(ours.eos_ids))


def test_dtype_is_the_checkpoints_unless_asked_for(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer, jnp.bfloat16)
    for name, flags, dtype in (("a", [], "bfloat16"), ("b", ["--dtype=float32"], "float32")):
        export.main(["export", str(run), str(tmp_path / name), *flags])
        config, params, _ = load_model(tmp_path / name, jnp.float32)
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == dtype
        jax.tree.map(np.testing.assert_array_equal, params, load_model(run)[1])


def test_a_list_of_pieces_is_read_by_transformers_and_by_us(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = vocab_tokenizer(dial.PIECES, eos=dial.END, pad=dial.PAD, name="dial")
    run, out = make_run(tmp_path, tokenizer), tmp_path / "out"
    export.main(["export", str(run), str(out)])
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(out)
    for prompt, text in dial.demonstrations("sloppy", 0, 50, modes=("exact", "max")):
        ids = tokenizer.encode(prompt + text)
        assert theirs(prompt + text)["input_ids"] == ids == ours.encode(prompt + text)
        assert theirs.decode(ids) == ours.decode(ids) == prompt + text
    assert (theirs.eos_token, theirs.pad_token, ours.eos_ids) == (dial.END, dial.PAD, tokenizer.eos_ids)


def test_what_cannot_be_exported_is_one_line(tmp_path, tokenizer):
    run = make_run(tmp_path, tokenizer)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for argv, said in (
        ([str(run)], "need a run and a directory"),
        ([str(tmp_path), str(tmp_path / "out")], "is not a run directory"),
        ([str(run), str(tmp_path / "full")], "not empty"),
        ([str(run), str(tmp_path / "out"), "--step=3"], "step 3"),
        ([str(run), str(tmp_path / "out"), "--dtype=int8"], "--dtype='int8': must be one of"),
    ):
        with pytest.raises(UserError, match=f"^[^\n]*{said}"):
            export.main(["export", *argv])
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


def test_orbax_alone_restores_what_is_written_for_it(tmp_path, tokenizer):
    import orbax.checkpoint as ocp

    run, out = make_run(tmp_path, tokenizer), tmp_path / "out"
    export.main(["export", str(run), str(out), "--step=2", "--format=orbax"])
    with ocp.StandardCheckpointer() as reader:
        restored = reader.restore(out / "params")
    expected = load_model(run, step=2)[1]
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    with pytest.raises(UserError, match="leave out --format=orbax"):
        export.main(["export", str(run), str(tmp_path / "b"), "--adapters", "--format=orbax"])
