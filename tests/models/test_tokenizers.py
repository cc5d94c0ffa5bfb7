"""Every tokenizer kind against reference encodings, save/load round trips, EOS sets, and damaged files."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import models.tokenizers
from models.tokenizers import (
    ChatTemplateError,
    VocabTokenizer,
    load_tokenizer,
    stream_text,
    token_texts,
    vocab_tokenizer,
)
from tests.shared import shared_path

CHAT = [{"role": "user", "content": "What is 2+2?"}]
_loaded = {}


def load(name):
    """A tokenizer of the shared data, loaded once."""
    if name not in _loaded:
        folder = "models" if name in ("stories260K", "digits_llama") else "tokenizers"
        _loaded[name] = load_tokenizer(shared_path("data", folder, name))
    return _loaded[name]


def references(name):
    return json.loads(shared_path("data", "tokenizers", "reference_encodings.json").read_text())[name]


def same(a, b):
    fields = ("vocab_size", "eos_ids", "pad_id", "bos_id")
    return all(getattr(a, f) == getattr(b, f) for f in fields)


@pytest.mark.parametrize("name", ["qwen3", "minimind", "llama2"])
def test_reference_encodings(name, tmp_path):
    tokenizer = load(name)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert same(tokenizer, again)
    for reference in references(name):
        text, ids = reference["text"], reference["ids"]
        for t in (tokenizer, again):
            assert t.encode(text) == ids
            assert t.decode(ids, skip_special=False) == text
            assert "".join(stream_text(t, ids)) == t.decode(ids)


def test_facts():
    facts = {name: load(name) for name in ("qwen3", "minimind", "llama2", "stories260K", "digits_llama")}
    assert {name: (t.vocab_size, t.eos_ids, t.pad_id, t.bos_id) for name, t in facts.items()} == {
        "qwen3": (151669, (151643,), 151643, None),
        "minimind": (6400, (2,), 0, None),  # names a BOS token, adds none
        "llama2": (32000, (2,), 2, 1),
        "stories260K": (512, (2,), 2, 1),
        "digits_llama": (16, (1,), 2, None),
    }


@pytest.mark.parametrize(
    "file", ["qwen3/tokenizer.json.gz", "minimind/tokenizer.json", "llama2/tokenizer.model"]
)
def test_single_file(file):
    name = file.split("/")[0]
    tokenizer = load_tokenizer(shared_path("data", "tokenizers", *file.split("/")))
    assert same(tokenizer, load(name))
    for reference in references(name):
        assert tokenizer.encode(reference["text"]) == reference["ids"]


def test_directory_with_only_a_gzip(tmp_path):
    source = shared_path("data", "tokenizers", "qwen3")
    shutil.copy(source / "tokenizer.json.gz", tmp_path)
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == load("qwen3").apply_chat_template(CHAT)


def test_special_tokens_are_hidden_on_request():
    ids = load("qwen3").encode("<|im_start|>user\nhi<|im_end|>")
    assert load("qwen3").decode(ids) == "user\nhi"
    ids = load("llama2").encode("<s>Hello</s>")
    assert ids == [1, 15043, 2]
    assert load("llama2").decode(ids) == "Hello"
    assert load("llama2").decode(ids, skip_special=False) == "<s>Hello</s>"


def test_chat_template():
    qwen = load("qwen3")
    text = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.apply_chat_template(CHAT) == qwen.encode(text)
    silent = qwen.encode(text + "<think>\n\n</think>\n\n")
    assert qwen.apply_chat_template(CHAT, enable_thinking=False) == silent
    assert load("llama2").apply_chat_template(CHAT) is None
    assert vocab_tokenizer("ab", "a", "b").apply_chat_template(CHAT) is None


def test_chat_template_of_a_sentencepiece_directory(tmp_path):
    load("llama2").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    template = "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == [1, *load("llama2").encode("[INST] What is 2+2? [/INST]")]
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == template


INST = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
IN_THE_WILD = {  # what templates use beyond plain jinja -> the text they write
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}": "What is 2+2?",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}": "What is 2+2?",
    "{{ strftime_now('%%') }}{{ messages[0] | tojson }}": '%{"role": "user", "content": "What is 2+2?"}',
    "{% set ns = namespace(n=1) %}{{ bos_token }}{{ ns.n }}{{ eos_token }}": "<s>1</s>",
    "{{ '\\u00e9<' | tojson }}{% if tools is none %}{{ messages[0].content[:4] }}{% endif %}": '"é<"What',
    "{%- if add_generation_prompt %}\n    {{- 'x' }}\n{%- endif %}": "x",
}


@pytest.mark.parametrize("template", IN_THE_WILD)
def test_what_templates_of_sentencepiece_directories_use(tmp_path, template):
    load("llama2").save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode(IN_THE_WILD[template])
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == template


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": INST}, {"name": "rag", "template": "{{ 'R' }}"}]
    llama = load("llama2")
    llama.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(tmp_path / "tokenizer_config.json", **config, chat_template=named)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(CHAT) == llama.encode("[INST] What is 2+2? [/INST]")
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == llama.encode("R")
    with pytest.raises(ChatTemplateError, match="no chat template 'tools'; valid: default, rag"):
        tokenizer.apply_chat_template(CHAT, chat_template="tools")
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_template == tokenizer.chat_template
    # the files of newer directories come before it, and a set without a default needs a name
    (tmp_path / "chat_template.jinja").write_text("{{ 'N' }}")
    assert load_tokenizer(tmp_path).apply_chat_template(CHAT) == llama.encode("N")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "a.jinja").write_text("{{ 'A' }}")
    assert load_tokenizer(tmp_path).apply_chat_template(CHAT) == llama.encode("A")
    (tmp_path / "additional_chat_templates" / "b.jinja").write_text("{{ 'B' }}")
    with pytest.raises(ChatTemplateError, match="no chat template 'default'; valid: a, b"):
        load_tokenizer(tmp_path).apply_chat_template(CHAT)


def test_named_templates_of_transformers(minimind):
    config = json.loads((minimind / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": INST}, {"name": "rag", "template": "R"}]
    write(minimind / "tokenizer_config.json", **config)
    tokenizer = load_tokenizer(minimind)
    assert tokenizer.apply_chat_template(CHAT) == tokenizer.encode("[INST] What is 2+2? [/INST]")
    assert tokenizer.apply_chat_template(CHAT, chat_template="rag") == tokenizer.encode("R")


@pytest.mark.parametrize("kind", ["llama2", "minimind"])
@pytest.mark.parametrize("template", ["{% if %}", "{{ messages[0].content + 1 }}", "{{ ''.__class__.mro() }}"])
def test_a_broken_template_is_one_line(kind, template, tmp_path):
    load(kind).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a")
    with pytest.raises(ChatTemplateError, match="chat template: .+") as error:
        tokenizer.apply_chat_template(CHAT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("older", [False, True])
def test_tokens_added_to_a_sentencepiece_model(tmp_path, older):
    """ChatML on a Llama 2 vocabulary: the tokens of the template have ids behind the model's own."""
    load("llama2").save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": {"content": "<|im_end|>"}}
    del config["added_tokens_decoder"]
    if older:
        write(tmp_path / "added_tokens.json", **{"<|im_start|>": 32000, "<|im_end|>": 32001})
    else:
        tokens = {"2": "</s>", "32000": "<|im_start|>", "32001": "<|im_end|>"}
        config["added_tokens_decoder"] = {i: {"content": t, "special": True} for i, t in tokens.items()}
    config["chat_template"] = "<|im_start|>user\n{{ messages[0].content }}{{ eos_token }}\n."
    write(tmp_path / "tokenizer_config.json", **config)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.apply_chat_template(CHAT)
    assert (ids[0], ids.count(32001), tokenizer.vocab_size, tokenizer.eos_ids) == (32000, 1, 32002, (2, 32001))
    shown = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n."
    assert tokenizer.decode(ids, skip_special=False) == shown
    hidden = shown.replace("<|im_end|>", "")
    assert tokenizer.decode(ids) == (hidden if older else hidden.replace("<|im_start|>", ""))
    tokenizer.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert same(tokenizer, again) and again.apply_chat_template(CHAT) == ids


def test_stories260k_text():
    tokenizer = load("stories260K")
    reference = json.loads(shared_path("data", "models", "stories260K", "reference.json").read_text())
    # BOS decodes to nothing, and the first piece's leading space is the tokenizer's own
    assert " " + tokenizer.decode(reference["ids"]) == reference["text"]
    assert tokenizer.encode(reference["text"][1:]) == reference["ids"][1:]
    assert "".join(stream_text(tokenizer, reference["ids"])) == reference["text"][1:]


def llama2c_encode(text, vocab):
    """llama2.c's published algorithm: characters (or bytes + 3), then merge the best pair."""
    ids = {piece: i for i, (piece, _) in reversed(list(enumerate(vocab)))}
    tokens = []
    for c in " " + text:
        tokens += [ids[c]] if c in ids else [b + 3 for b in c.encode()]
    while True:
        pairs = [vocab[a][0] + vocab[b][0] for a, b in zip(tokens, tokens[1:], strict=False)]
        scored = [(vocab[ids[p]][1], -i) for i, p in enumerate(pairs) if p in ids]
        if not scored:
            return tokens
        at = -max(scored)[1]
        tokens[at : at + 2] = [ids[pairs[at]]]


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_characters="\u2581\x00", blacklist_categories=["Cs"]), min_size=1))
@example("Once upon a time,  there was\n\ta naïve 🙂 dog.")
def test_stories260k_encodes_as_llama2c_does(text):
    tokenizer = load("stories260K")
    vocab = json.loads(shared_path("data", "models", "stories260K", "vocab512.json").read_text())
    if "<s>" in text or "</s>" in text:
        return
    ids = tokenizer.encode(text)
    assert ids == llama2c_encode(text, vocab)
    assert tokenizer.decode(ids) == text


def test_character_tokenizer(tmp_path):
    tokenizer = load("digits_llama")
    assert tokenizer.encode("8,3:9,4") == [12, 14, 7, 15, 13, 14, 8]
    prompt = [{"role": "user", "content": "8,3:9,4"}]
    assert tokenizer.apply_chat_template(prompt) == [12, 14, 7, 15, 13, 14, 8, 0]
    assert tokenizer.decode([11, 14, 6, 1, 2, 2]) == "7,2"
    assert tokenizer.encode("a") == [3]
    with pytest.raises(ValueError, match="System role not supported"):
        tokenizer.apply_chat_template([{"role": "system", "content": ""}])
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert same(tokenizer, again) and again.apply_chat_template(prompt) == tokenizer.apply_chat_template(
        prompt
    )


PIECES = ["<pad>", ".", "a", "ab", "abc", " => ", "=", " ", "\n", "é", "+5", "+"]


def test_vocab_tokenizer(tmp_path):
    tokenizer = vocab_tokenizer(PIECES, eos=".", pad="<pad>", name="toy")
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size) == (
        (1,),
        0,
        None,
        12,
    )
    assert tokenizer.encode("abcab => aé\n+5.<pad>") == [4, 3, 5, 2, 9, 8, 10, 1, 0]
    assert (
        tokenizer.decode([4, 1, 0]) == "abc"
        and tokenizer.decode([4, 1, 0], skip_special=False) == "abc.<pad>"
    )
    with pytest.raises(ValueError, match="toy: no piece for 'x'"):
        tokenizer.encode("abx")
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert same(tokenizer, again) and again.pieces == PIECES


@given(st.lists(st.sampled_from(PIECES)))
def test_vocab_tokenizer_text_round_trip(pieces):
    tokenizer = vocab_tokenizer(PIECES, eos=".", pad="<pad>")
    text = "".join(pieces)
    try:
        ids = tokenizer.encode(text)
    except ValueError:  # greedy matching may strand a character: it then says so instead of dropping it
        return
    assert tokenizer.decode(ids, skip_special=False) == text


def test_vocab_tokenizer_refuses():
    with pytest.raises(ValueError, match="eos piece 'z' is not in"):
        vocab_tokenizer("ab", eos="z", pad="a")
    with pytest.raises(ValueError, match="distinct"):
        vocab_tokenizer(["a", "a"], eos="a", pad="a")
    with pytest.raises(ValueError, match="without EOS"):
        VocabTokenizer(["a"], {"pad": "a"})


@pytest.mark.parametrize("name", ["qwen3", "llama2", "digits_llama"])
def test_ids_of_padded_embeddings_decode_to_nothing(name):
    t = load(name)
    ids = t.encode("12")
    assert t.decode([*ids, t.vocab_size, t.vocab_size + 200]) == t.decode(ids) == "12"


def test_stream_holds_back_partial_characters():
    tokenizer = load("stories260K")
    parts = list(stream_text(tokenizer, tokenizer.encode("a 🙂!")))
    assert "".join(parts) == "a 🙂!" and not any("\ufffd" in p for p in parts)
    cut = tokenizer.encode("a 🙂")[:-1]
    assert "".join(stream_text(tokenizer, cut)) == tokenizer.decode(cut)


@pytest.mark.parametrize("name", ["stories260K", "llama2", "qwen3"])
def test_texts_of_tokens_are_one_each_and_joined_the_text_of_all(name):
    tokenizer = load(name)
    eos = min(tokenizer.eos_ids)
    for text in ("one two three", "a 🙂! b", "", "é\n\n x"):
        ids = [*tokenizer.encode(text), eos]
        for part in (ids, ids[:-2], ids[:3], ids[:1], []):
            texts = token_texts(tokenizer, part)
            assert len(texts) == len(part) and "".join(texts) == tokenizer.decode(part, False)


def test_stream_gives_text_as_it_comes():
    tokenizer = load("llama2")
    stream = stream_text(tokenizer, iter(tokenizer.encode("one two three")))
    assert [next(stream), next(stream)] == ["one", " two"]


# --- end-of-sequence sets


def write(path, **content):
    path.write_text(json.dumps(content))


@pytest.fixture
def minimind(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_path("data", "tokenizers", "minimind", file), tmp_path / file)
    return tmp_path


def test_eos_set(minimind):
    write(minimind / "config.json", model_type="llama", eos_token_id=5)
    assert load_tokenizer(minimind).eos_ids == (5, 2)
    write(minimind / "generation_config.json", eos_token_id=[7, 2], pad_token_id=9)
    tokenizer = load_tokenizer(minimind)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ((7, 2), 9)
    tokenizer.save(minimind / "again")
    assert same(load_tokenizer(minimind / "again"), tokenizer)


def test_tokenizer_without_eos(minimind):
    config = json.loads((minimind / "tokenizer_config.json").read_text())
    write(minimind / "tokenizer_config.json", **{k: v for k, v in config.items() if k != "eos_token"})
    with pytest.raises(
        ValueError, match="tokenizer without EOS: .*tokenizer_config.json.*generation_config.json"
    ):
        load_tokenizer(minimind)
    write(minimind / "generation_config.json", eos_token_id=2)
    assert load_tokenizer(minimind).eos_ids == (2,)


@pytest.mark.parametrize("bad", [6400, -3, "2"])
def test_eos_outside_the_vocabulary(minimind, bad):
    write(minimind / "generation_config.json", eos_token_id=bad)
    with pytest.raises(ValueError, match=f"{bad!r} is not in 0..6399"):
        load_tokenizer(minimind)


# --- unknown and damaged files: one line naming the file


def refused(path, *parts):
    with pytest.raises(ValueError) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert "\n" not in message
    for part in (str(path), *parts):
        assert part in message, message


def test_nothing_there(tmp_path):
    refused(tmp_path / "absent", "no such")
    refused(tmp_path, "no tokenizer found", "tokenizer.model")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", "no tokenizer found")


def test_damaged_files(tmp_path):
    folder = pathlib.Path(shared_path("data"))
    cases = {
        "tokenizer.json": folder / "tokenizers/minimind/tokenizer.json",
        "tokenizer.json.gz": folder / "tokenizers/qwen3/tokenizer.json.gz",
        "tokenizer.model": folder / "tokenizers/llama2/tokenizer.model",
        "tok512.bin": folder / "models/stories260K/tok512.bin",
    }
    for name, source in cases.items():
        file = tmp_path / name
        content = source.read_bytes()
        for keep in (0, 100, len(content) // 2 + 1):
            file.write_bytes(content[:keep])
            refused(file)


def test_foreign_vocab_json(tmp_path):
    write(tmp_path / "vocab.json", hello=0)
    refused(tmp_path, "vocab.json", "'pieces'")


def test_checkpoint_code_is_not_run(minimind):
    config = json.loads((minimind / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    write(minimind / "tokenizer_config.json", **config)
    (minimind / "code.py").write_text("raise SystemExit('ran code of the checkpoint')")
    refused(minimind, "custom code")


def test_heavy_libraries_are_not_imported():
    code = (
        "import sys, models.tokenizers as t, models.weights, models.config\n"
        "t.vocab_tokenizer('ab', 'a', 'b').encode('ab')\n"
        "heavy = {'transformers', 'torch', 'sentencepiece', 'tokenizers', 'jinja2'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    root = pathlib.Path(models.tokenizers.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
