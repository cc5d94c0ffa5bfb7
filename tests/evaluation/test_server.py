"""Evaluation of a served model against HTTP servers on loopback: a stand-in that fails at times, and llama.cpp's own
where its package and a model are."""

import http.server
import json
import os
import pathlib
import threading

import pytest

from jaxrl import evaluate
from jaxrl.errors import UserError
from jaxrl.evaluation.server import Server
from tests.shared import shared_path


class StandIn(http.server.BaseHTTPRequestHandler):
    """Answers every question with its length in words; every third request fails in one of the ways that can pass."""

    requests: list = []
    refuse = None
    lock = threading.Lock()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.requests.append((self.path, body, self.headers.get("Authorization")))
            number = len(self.requests)
        if self.refuse:
            return self.answer(*self.refuse)
        if number % 3 == 0:
            return self.answer(*((503, b"busy") if number % 2 else (200, b"{not json")))
        chat = self.path.endswith("/chat/completions")
        asked = body["messages"][-1]["content"] if chat else body["prompt"]
        text = f"So it is \\boxed{{{asked.count('one')}}}."
        choice = {"message": {"content": text}} if chat else {"text": text}
        usage = {"completion_tokens": len(asked) % 7 + 3, "prompt_tokens": len(asked)}
        self.answer(200, json.dumps({"choices": [choice | {"finish_reason": "stop"}], "usage": usage}).encode())

    def answer(self, code, data):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(Server.__init__, "__kwdefaults__", Server.__init__.__kwdefaults__ | {"wait": lambda s: None})
    StandIn.requests, StandIn.refuse = [], None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


def run(url, tmp_path, *flags):
    data = tmp_path / "ones.jsonl"
    rows = [{"id": str(i), "problem": "one " * i + "?", "answer": str(i + (i == 3))} for i in range(1, 7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    evaluate.main(["evaluate", "--model=m", f"--data={data}", f"--out={out}", f"--server={url}", *flags])
    return json.loads((out / "result.json").read_text())["results"]


def test_samples_grades_and_counts_what_a_server_answers_through_its_failures(served, tmp_path):
    (row,) = run(served, tmp_path, "--samples=2", "--slots=3", "--temperature=0.5")
    assert row["accuracy"] == pytest.approx(5 / 6) and row["problems"] == 6 and row["samples"] == 2
    bodies = [body for path, body, _ in StandIn.requests if path == "/v1/chat/completions"]
    assert len(bodies) >= 12 and all(b["model"] == "m" and b["temperature"] == 0.5 for b in bodies)
    assert len({(b["seed"], b["messages"][-1]["content"]) for b in bodies}) == 12  # a retry asks for the same sample
    sizes = [len("one " * i + "?" + " Let's think step by step and output the final answer within \\boxed{}.") % 7 + 3
             for i in range(1, 7)]  # fmt: skip
    assert row["mean_tokens"] == pytest.approx(sum(sizes) / 6)


def test_a_second_call_asks_nothing_and_a_budget_is_in_the_prompt(served, tmp_path):
    flags = ("--budgets=64", "--budget_mode=max", "--template=boxed")
    (first,) = run(served, tmp_path, *flags)
    asked = len(StandIn.requests)
    assert all(b["prompt"].endswith(" Think for maximum 64 tokens.") for _, b, _ in StandIn.requests)
    assert run(served, tmp_path, *flags) == [first] and len(StandIn.requests) == asked
    assert first["budget"] == 64 and first["mean_error"] < 0


def test_answers_with_and_without_thinking_are_kept_apart(served, tmp_path):
    run(served, tmp_path, "--limit=1", "--enable_thinking=on")
    with pytest.raises(UserError, match="enable_thinking='?on'?, now '?off'?; choose another --out"):
        run(served, tmp_path, "--limit=1", "--enable_thinking=off")


def test_a_refusal_is_one_line_and_what_was_answered_is_kept(served, tmp_path):
    StandIn.refuse = (404, b"no model m")
    with pytest.raises(UserError, match="/chat/completions answered 404 no model m"):
        run(served, tmp_path)
    assert len({json.dumps(b) for _, b, _ in StandIn.requests}) == len(StandIn.requests)  # not tried again
    StandIn.refuse = (529, b"busy")
    with pytest.raises(UserError, match="failed 7 times, the last time: 529 busy"):
        run(served, tmp_path)
    StandIn.refuse = (200, b'{"choices": [{"message": {"content": "1"}}]}')
    with pytest.raises(UserError, match="without choices or usage"):
        run(served, tmp_path)
    StandIn.refuse = (200, b'{"choices": [{"message": null}], "usage": {"completion_tokens": 1}}')
    with pytest.raises(UserError, match="without choices or usage"):
        run(served, tmp_path)


@pytest.mark.parametrize("content, said", [
    (None, "<think>so"), ("4", "<think>so</think>4"), (chr(0xD800), "<think>so</think>?"),
])  # fmt: skip
def test_thinking_that_a_server_cuts_out_is_put_back_and_left_open_where_it_was_cut_off(served, content, said):
    message = {"content": content, "reasoning_content": "so"}
    usage = {"completion_tokens": 3}
    StandIn.refuse = (200, json.dumps({"choices": [{"message": message}], "usage": usage}).encode())
    assert Server(served, "m").complete([{"role": "user", "content": "?"}], {})["text"] == said


def test_flags_about_checkpoints_are_refused(tmp_path):
    for flag in ("--step=3", "--all_checkpoints", "--distributed"):
        with pytest.raises(UserError, match="cannot be used with --server"):
            evaluate.main(["evaluate", "--model=m", "--data=x", f"--out={tmp_path}", "--server=http://x/v1", flag])


def test_forcing_needs_the_text_that_closes_thinking(tmp_path):
    flags = ["--model=m", "--data=x", f"--out={tmp_path}", "--budgets=8", "--budget_mode=forced", "--end_thinking="]
    with pytest.raises(UserError, match="--end_thinking='': --budget_mode=forced needs the text"):
        evaluate.main(["evaluate", *flags])


@pytest.mark.slow
def test_llama_cpp_server(tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="pip install xllamacpp: llama.cpp's server")
    model = pathlib.Path(os.environ.get("JAXRL_GGUF", "")).expanduser()
    if not model.is_file():
        pytest.skip("JAXRL_GGUF names no GGUF file of an instruction-tuned model")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.port = str(model), 2048, 2, 0
    server = xllamacpp.Server(params)
    out = tmp_path / "out"
    data, url = shared_path("data/gsm8k_test.jsonl"), f"{server.listening_address}/v1"
    flags = ("--model=any", f"--data={data}", f"--out={out}", f"--server={url}", "--limit=4", "--max_new_tokens=48")
    evaluate.main(["evaluate", *flags, "--slots=2"])
    (row,) = json.loads((out / "result.json").read_text())["results"]
    assert row["problems"] == 4 and 0 < row["mean_tokens"] <= 48
