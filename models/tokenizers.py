"""Text to token ids and back, behind one small interface, for every kind of tokenizer checkpoints come with.

    HFTokenizer             tokenizer.json, or vocab.json + merges.txt, through transformers
    SentencePieceTokenizer  tokenizer.model; also llama2.c's tokenizer file, rebuilt as a sentencepiece model
    VocabTokenizer          a list of pieces, matched greedily: the quickstart's, and character tokenizers

`load_tokenizer` recognises which. Libraries are imported when needed: transformers alone takes seconds.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from models.config import read_json

KINDS = (
    "tokenizer.json, tokenizer.json.gz, vocab.json + merges.txt, tokenizer.model, a llama2.c tok*.bin, "
    "vocab.json with 'pieces', or tokenizer_config.json with 'char_ords'"
)


class ChatTemplateError(ValueError):
    """A chat template is broken, or refuses a conversation."""


class Tokenizer:
    """What the rest of the code sees of any tokenizer.

    name: for messages. vocab_size: ids are below it; larger ones (padded embeddings) decode to nothing.
    unused_ids: ids below it that stand for nothing.
    eos_ids: every id that ends a response, at least one. pad_id: fills rows, never trained on. bos_id: the id
    the model expects before plain text, None if it was not trained with one (chat templates write their own).
    Raises ValueError if there is no end-of-sequence id.
    """

    chat_template: str | dict[str, str] | None = None
    unused_ids: Sequence[int] = ()

    def __init__(
        self, name: str, vocab_size: int, eos_ids: Iterable[int], pad_id: int | None, bos_id: int | None
    ):
        self.name, self.vocab_size, self.bos_id = name, vocab_size, bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        if not self.eos_ids:
            raise ValueError(
                f"{name}: tokenizer without EOS: set eos_token in tokenizer_config.json or eos_token_id "
                "(an id or a list) in generation_config.json"
            )
        self.pad_id = self.eos_ids[0] if pad_id is None else pad_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text; nothing is added at either end."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; skip_special leaves out control tokens such as EOS and padding."""
        raise NotImplementedError

    def apply_chat_template(self, messages: list[dict[str, str]], **options) -> list[int] | None:
        """Ids of a conversation ([{"role", "content"}]) up to where the assistant starts to write.

        None if the tokenizer has no chat template. Of several named templates "default" is taken, or the only one, or
        the one that options call chat_template. Other options go to the template (e.g. enable_thinking=False).
        Raises ChatTemplateError, one line, for a template that is broken or refuses the conversation.
        """
        template = self._template(options.pop("chat_template", "default"))
        if template is None:
            return None
        try:
            text = self._render(template, messages, {"add_generation_prompt": True} | options)
        except Exception as e:  # a template is a program: it raises whatever it likes
            line = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise ChatTemplateError(f"{self.name}: chat template: {line}") from e
        return self.encode(text)

    def _template(self, name: str) -> str | None:
        """The chat template of that name; where there is only one, it needs none."""
        if not isinstance(self.chat_template, dict):
            return self.chat_template
        if name not in self.chat_template and len(self.chat_template) > 1:
            raise ChatTemplateError(f"{self.name}: no chat template {name!r}; valid: {', '.join(self.chat_template)}")
        return self.chat_template.get(name, next(iter(self.chat_template.values()), None))

    def _render(self, template: str, messages: list[dict], options: dict) -> str:
        """The template's text, with what transformers gives templates: sandbox, strftime_now, loop controls, ...."""
        from transformers.utils.chat_template_utils import render_jinja_template

        values = self._template_tokens() | options
        return render_jinja_template(conversations=[messages], chat_template=template, **values)[0][0]

    def save(self, directory: str | os.PathLike) -> None:
        """Write what load_tokenizer(directory) reads back; the EOS set goes to generation_config.json."""
        root = pathlib.Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        self._save(root)
        eos = list(self.eos_ids) if len(self.eos_ids) > 1 else self.eos_ids[0]
        ids = {"bos_token_id": self.bos_id, "eos_token_id": eos, "pad_token_id": self.pad_id}
        _write_json(root / "generation_config.json", {k: v for k, v in ids.items() if v is not None})

    def _template_tokens(self) -> dict[str, str]:
        return {}

    def _save(self, root: pathlib.Path) -> None:
        raise NotImplementedError


class HFTokenizer(Tokenizer):
    """A transformers tokenizer (`inner`)."""

    def __init__(self, inner: Any, name: str, eos_ids: Iterable[int] = (), pad_id: int | None = None):
        eos = [*eos_ids, *([] if inner.eos_token_id is None else [inner.eos_token_id])]
        # a tokenizer may name a BOS token without ever adding it: trust what it does
        bos = inner.bos_token_id
        bos = bos if bos is not None and inner("a")["input_ids"][:1] == [bos] else None
        ids = set(inner.get_vocab().values())
        size = max(ids) + 1  # len(inner) is too small when ids have gaps
        self.unused_ids = sorted(set(range(size)) - ids)
        super().__init__(name, size, eos, inner.pad_token_id if pad_id is None else pad_id, bos)
        self.inner, self.chat_template = inner, inner.chat_template

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def _render(self, template: str, messages: list[dict], options: dict) -> str:
        return self.inner.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    def _save(self, root: pathlib.Path) -> None:
        self.inner.save_pretrained(root)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, given as its serialised ModelProto."""

    def __init__(
        self, model: bytes, name: str, eos_ids: Iterable[int] = (), pad_id: int | None = None, **config
    ):
        """config: of tokenizer_config.json, add_bos_token, added_tokens_decoder, chat_template and *_token matter."""
        import sentencepiece

        try:
            self.inner = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{name}: truncated or not a sentencepiece model ({e})") from None
        sp, size = self.inner, self.inner.get_piece_size()
        added = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items() if int(i) >= size}
        self.added = dict(sorted(added.items()))
        control = {sp.id_to_piece(i): i for i in range(size) if sp.is_control(i)}
        self._control = control | {token["content"]: i for i, token in self.added.items()}
        pieces = {key: self._control.get(_content(config.get(key))) for key in ("eos_token", "pad_token", "bos_token")}
        self._eos = sp.eos_id() if pieces["eos_token"] is None else pieces["eos_token"]
        eos = [*eos_ids, *([self._eos] if self._eos >= 0 else [])]
        pad = next((i for i in (pad_id, pieces["pad_token"], sp.pad_id()) if i is not None and i >= 0), None)
        bos = sp.bos_id() if pieces["bos_token"] is None else pieces["bos_token"]
        bos = bos if bos >= 0 and config.get("add_bos_token", True) else None
        super().__init__(name, max([size - 1, *self.added]) + 1, eos, pad, bos)
        self.model, self.chat_template = model, config.get("chat_template")
        longest_first = sorted(self._control, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, text: str) -> list[int]:
        """As in Tokenizer; control pieces spelled out in the text (chat templates do) become their ids."""
        ids, start = [], 0
        for match in self._split.finditer(text):
            ids += [*self.inner.encode(text[start : match.start()]), self._control[match.group()]]
            start = match.end()
        return ids + self.inner.encode(text[start:])

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text, run, size = "", [], self.inner.get_piece_size()
        for i in map(int, ids):
            if i < size and (skip_special or not self.inner.is_control(i)):
                run.append(i)  # sentencepiece itself drops control pieces
                continue
            token = self.added.get(i, {"content": ""}) if i >= size else {"content": self.inner.id_to_piece(i)}
            hidden = skip_special and (token.get("special") or i in self.eos_ids or i == self.pad_id)
            text, run = text + self.inner.decode(run) + ("" if hidden else token["content"]), []
        return text + self.inner.decode(run)

    def _template_tokens(self) -> dict[str, str]:
        piece, sp = self.inner.id_to_piece, self.inner
        bos = sp.bos_id() if self.bos_id is None else self.bos_id
        ids = {"bos_token": bos, "eos_token": self._eos, "unk_token": sp.unk_id()}
        return {name: self.added[i]["content"] if i in self.added else piece(i) for name, i in ids.items() if i >= 0}

    def _save(self, root: pathlib.Path) -> None:
        (root / "tokenizer.model").write_bytes(self.model)
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": self.bos_id is not None}
        config |= {"add_eos_token": False, **self._template_tokens(), "added_tokens_decoder": self.added}
        template = self.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        config |= {} if template is None else {"chat_template": template}
        _write_json(root / "tokenizer_config.json", config)


class VocabTokenizer(Tokenizer):
    """Greedy longest match on a list of pieces; a piece's id is its place in the list."""

    def __init__(
        self,
        pieces: Sequence[str],
        special: dict[str, str],
        name: str = "vocab",
        chat_template: str | None = None,
    ):
        self.pieces, self.special, self.chat_template = list(pieces), dict(special), chat_template
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        if len(self._ids) < len(self.pieces) or "" in self._ids:
            raise ValueError(f"{name}: key 'pieces' needs distinct, non-empty strings")
        for role, piece in self.special.items():
            if piece not in self._ids:
                raise ValueError(f"{name}: {role} piece {piece!r} is not in key 'pieces'")
        role = {role: self._ids[piece] for role, piece in self.special.items()}
        super().__init__(
            name, len(self.pieces), [role["eos"]] if "eos" in role else [], role.get("pad"), role.get("bos")
        )
        self._hidden, self._unknown = set(role.values()), role.get("unk")
        longest_first = sorted(map(re.escape, self.pieces), key=len, reverse=True)
        self._match = re.compile("|".join([*longest_first, "."]), re.DOTALL)

    def encode(self, text: str) -> list[int]:
        """As in Tokenizer. Raises ValueError at text no piece matches, unless there is an "unk" piece."""
        ids = [self._ids.get(piece, self._unknown) for piece in self._match.findall(text)]
        if None in ids:
            unknown = next(p for p in self._match.findall(text) if p not in self._ids)
            raise ValueError(f"{self.name}: no piece for {unknown!r} in {text[:80]!r}")
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        hidden = self._hidden if skip_special else ()
        return "".join(self.pieces[i] for i in map(int, ids) if i < self.vocab_size and i not in hidden)

    def _template_tokens(self) -> dict[str, str]:
        return {f"{role}_token": piece for role, piece in self.special.items()}

    def _save(self, root: pathlib.Path) -> None:
        content = {"pieces": self.pieces, "special": self.special, "chat_template": self.chat_template}
        _write_json(root / "vocab.json", {k: v for k, v in content.items() if v is not None})


def vocab_tokenizer(pieces: Sequence[str], eos: str, pad: str, name: str = "vocab") -> VocabTokenizer:
    """Tokenizer of a fixed list of pieces; two of them, eos and pad, are control tokens without text."""
    return VocabTokenizer(pieces, {"eos": eos, "pad": pad}, name)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model directory, or of one tokenizer file.

    Its EOS set is eos_token_id of generation_config.json, or else of config.json, and the tokenizer's own
    eos token. Nothing is downloaded and no code of the checkpoint is run.
    Raises ValueError, one line naming the file, for an unknown kind, a damaged file or a missing EOS.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such tokenizer file or directory")
    try:
        return _load(path)
    except (TypeError, AttributeError, KeyError, OverflowError, RecursionError, OSError) as e:
        line = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path}: malformed tokenizer: {line}") from e


def _load(path: pathlib.Path) -> Tokenizer:
    root = path if path.is_dir() else path.parent
    config = _optional_json(root / "tokenizer_config.json")
    config["chat_template"] = _chat_template(root, config)
    if "added_tokens_decoder" not in config:  # how older directories say it
        older = _optional_json(root / "added_tokens.json").items()
        config["added_tokens_decoder"] = {id_: {"content": text} for text, id_ in older}
    generation = _optional_json(root / "generation_config.json")
    model = _optional_json(root / "config.json")
    eos = next((v for c in (generation, model) if (v := c.get("eos_token_id")) is not None), [])
    eos = eos if isinstance(eos, list) else [eos]
    pad = generation.get("pad_token_id", model.get("pad_token_id"))
    pad = None if pad == -1 else pad  # how old Llama configs say none
    name = path.name if path.is_dir() else str(path)
    file = _find(path, config)
    if file is None:
        raise ValueError(f"{path}: no tokenizer found: need {KINDS}")
    if file.suffix == ".model":
        tokenizer = SentencePieceTokenizer(file.read_bytes(), name, eos, pad, **config)
    elif file.suffix == ".bin":
        tokenizer = SentencePieceTokenizer(llama2c_model(file), name, eos, pad, **config)
    elif file.name == "tokenizer_config.json":
        tokenizer = _character_tokenizer(config, name)
    elif file.name == "vocab.json" and not (root / "merges.txt").exists():
        tokenizer = _saved_vocab(file, config, name)
    else:
        tokenizer = HFTokenizer(_load_hf(file, config), name, eos, pad)
    for id_ in (*tokenizer.eos_ids, tokenizer.pad_id):
        if not isinstance(id_, int) or not 0 <= id_ < tokenizer.vocab_size:
            raise ValueError(f"{path}: eos or pad token id {id_!r} is not in 0..{tokenizer.vocab_size - 1}")
    return tokenizer


def _chat_template(root: pathlib.Path, config: dict) -> str | dict[str, str] | None:
    """The template or templates of a directory: *.jinja files before tokenizer_config.json, as in transformers."""
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    files = {file.stem: file for file in sorted(root.glob("additional_chat_templates/*.jinja"))}
    if (root / "chat_template.jinja").exists():
        files["default"] = root / "chat_template.jinja"
    if not files:
        return template
    named = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    return named["default"] if list(named) == ["default"] else named


def _find(path: pathlib.Path, config: dict) -> pathlib.Path | None:
    """The file that says what kind of tokenizer this is."""
    if path.is_file():
        return path if path.suffix in (".json", ".gz", ".model", ".bin") else None
    vocab = path / "vocab.json"
    candidates = [
        (path / "tokenizer.json", True),
        (vocab, (path / "merges.txt").exists() or not (path / "tokenizer.model").exists()),
        (path / "tokenizer.json.gz", True),
        (path / "tokenizer_config.json", "char_ords" in config),
        (path / "tokenizer.model", True),
        *((file, True) for file in sorted(path.glob("tok*.bin"))),
    ]
    return next((file for file, fits in candidates if fits and file.exists()), None)


def _load_hf(file: pathlib.Path, config: dict) -> Any:
    """A transformers tokenizer from local files only, never running code that came with the checkpoint."""
    import tokenizers
    import transformers

    try:
        if file.name in ("tokenizer.json", "vocab.json"):
            return transformers.AutoTokenizer.from_pretrained(
                file.parent, local_files_only=True, trust_remote_code=False
            )
        text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        special = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if value := config.get(key):
                special[key] = _content(value)
        inner = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
        chat = config["chat_template"]
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=chat, **special)
    except Exception as e:  # the libraries raise anything, bare Exception included, for a damaged file
        line = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"{file}: not a tokenizer that transformers can load: {line}") from e


def llama2c_model(file: pathlib.Path) -> bytes:
    """The serialised sentencepiece ModelProto equivalent to a llama2.c tokenizer file.

    The file: int32 longest piece, then per piece float32 score, int32 length, the bytes. Encoding is BPE by
    best score with a space put before the text, unknown characters as their bytes (ids 3..258).
    """
    from sentencepiece import sentencepiece_model_pb2 as pb

    raw, entries, at = file.read_bytes(), [], 4
    try:
        (longest,) = struct.unpack_from("<i", raw)
        while at < len(raw):
            score, size = struct.unpack_from("<fi", raw, at)
            at += 8 + size
            if not 0 <= size <= longest or at > len(raw):
                raise ValueError(f"piece {len(entries)} has length {size}")
            entries.append((raw[at - size : at].decode("utf-8"), score))
        if len(entries) < 259:
            raise ValueError(f"{len(entries)} pieces")
    except (struct.error, ValueError) as e:
        raise ValueError(f"{file}: truncated or not a llama2.c tokenizer file ({e})") from None
    model, piece = pb.ModelProto(), pb.ModelProto.SentencePiece
    for i, (text, score) in enumerate(entries):
        kind = piece.BYTE if i < 259 else piece.NORMAL
        kind = (piece.UNKNOWN, piece.CONTROL, piece.CONTROL)[i] if i < 3 else kind
        text = text.strip("\n") if i < 3 else text.replace(" ", "\u2581")
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = pb.TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(entries)
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def _character_tokenizer(config: dict, name: str) -> VocabTokenizer:
    """One id per character of char_ords (code points), after separator, end, padding and unknown."""
    special = {"sep": "<sep>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}
    return VocabTokenizer(
        [*special.values(), *map(chr, config["char_ords"])], special, name, config.get("chat_template")
    )


def _saved_vocab(file: pathlib.Path, config: dict, name: str) -> VocabTokenizer:
    content = read_json(file)
    pieces, special = content.get("pieces"), content.get("special")
    if not isinstance(pieces, list) or not isinstance(special, dict):
        raise ValueError(f"{file}: need keys 'pieces' and 'special', or a merges.txt beside a BPE vocabulary")
    return VocabTokenizer(pieces, special, name, content.get("chat_template", config["chat_template"]))


def _content(token: str | dict | None) -> str | None:
    """The text of a special token, which tokenizer_config.json gives as it is or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token


def _optional_json(path: pathlib.Path) -> dict:
    return read_json(path) if path.exists() else {}


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of ids as they arrive; a character split over several tokens is held back until it is whole."""
    return (text for text in _texts(tokenizer, ids, True) if text)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, special ones spelled out; joined they are the text of all. A character split over several
    tokens belongs to the last of them; the others have no text."""
    *texts, rest = _texts(tokenizer, ids, False)
    return [*texts[:-1], texts[-1] + rest] if texts else []


def _texts(tokenizer: Tokenizer, ids: Iterable[int], skip_special: bool) -> Iterator[str]:
    """The text of each token, "" where it is held back, and at the end what never became whole.

    Decodes a short window twice per token (without and with the newest) because a token's text, its leading
    space above all, depends on the one before it.
    """
    window, shown = [], 0
    for i in ids:
        window.append(i)
        text, before = tokenizer.decode(window, skip_special), tokenizer.decode(window[:shown], skip_special)
        whole = len(text) > len(before) and not text.endswith("\ufffd")
        yield text[len(before) :] if whole else ""
        if whole:
            window, shown = window[shown:], len(window) - shown
    yield tokenizer.decode(window, skip_special)[len(tokenizer.decode(window[:shown], skip_special)) :]
