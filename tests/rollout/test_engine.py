"""The slot engine: the same completions whatever the schedule, and those of a plain loop."""

import dataclasses
import functools
import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.rollout.cache import bucket
from jaxrl.rollout.engine import Request, SamplingParams
from jaxrl.rollout.kernels import ProgramSpec
from jaxrl.rollout.programs import sampler_programs
from models.attention import from_blocks, to_blocks
from tests.rollout import tiny


@functools.cache
def shared():
    """One sampler for the tests that do not vary it, so that they share compiled programs."""
    s = tiny.sampler(chunk=8, window=32)
    return s, s.layout(tiny.params())


def generate(requests, **options):
    s, params = shared()
    return s.generate(params, requests, seed=11, **options)


@functools.cache
def baseline():
    return generate(tiny.requests())


def test_the_workload_is_ragged():
    lengths = {c.length for g in baseline() for c in g}
    finishes = {c.finish for g in baseline() for c in g}
    assert len(lengths) >= 5 and finishes == {"eos", "length"}


def test_large_matrices_are_stored_transposed_on_one_cpu_in_float32(monkeypatch):
    assert "kernel" in shared()[1]["lm_head"]  # these are small
    monkeypatch.setattr("jaxrl.rollout.engine.LARGE", 512)
    sampler = tiny.sampler(chunk=8, window=32)
    params = sampler.layout(tiny.params())
    assert set(params["lm_head"]) == {"kernel_transposed"} and "gate_up_transposed" in params["layer_0"]["mlp"]
    for got, expected in zip(sampler.generate(params, tiny.requests(), seed=11), baseline(), strict=True):
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert "kernel" in tiny.sampler(dtype=jnp.bfloat16).layout(tiny.params())["lm_head"]


def test_tokens_and_logprobs_are_those_of_a_plain_loop():
    for request, group in zip(tiny.requests(), baseline(), strict=True):
        for sample, completion in enumerate(group):
            tokens, logps = tiny.reference(request, sample, seed=11)
            np.testing.assert_array_equal(completion.tokens, tokens)
            np.testing.assert_allclose(completion.logprobs, logps, atol=1e-5)
            ended = tokens[-1] in tiny.EOS
            assert completion.finish == ("eos" if ended else "length")
            assert len(tokens) <= request.max_tokens


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(slots=1, chunk=24, window=64), marks=pytest.mark.slow),
        pytest.param(dict(slots=3, chunk=5, window=32), marks=pytest.mark.slow),
        dict(slots=16, chunk=3, window=24),
        dict(slots=3, chunk=5, window=32, prefill_chunk=7),
    ],
    ids=str,
)
def test_same_completions_for_any_schedule(options):
    s = tiny.sampler(**options)
    tiny.same(s.generate(s.layout(tiny.params()), tiny.requests(), seed=11), baseline())


def test_same_completions_in_any_order_of_requests_and_starts():
    requests = tiny.requests()
    order = [3, 0, 5, 4, 1, 2]
    shuffled = [dataclasses.replace(requests[i], expected=float(i % 3)) for i in order]
    tiny.same(generate(shuffled), [baseline()[i] for i in order])


def test_shared_prefill_equals_separate_prefill():
    alone = [dataclasses.replace(r, samples=1, first_sample=j) for r in tiny.requests() for j in range(3)]
    tiny.same([sum(generate(alone)[3 * i : 3 * i + 3], []) for i in range(6)], baseline())


def test_seed_step_and_key_all_change_the_tokens():
    s, params = shared()
    one = [dataclasses.replace(tiny.requests()[0], samples=2)]
    first = s.generate(params, one, seed=1, step=2)[0]
    assert not np.array_equal(first[0].tokens, first[1].tokens)
    for changed in (
        s.generate(params, one, seed=2, step=2),
        s.generate(params, one, seed=1, step=3),
        s.generate(params, [dataclasses.replace(one[0], key=101)], seed=1, step=2),
    ):
        assert not np.array_equal(changed[0][0].tokens, first[0].tokens)


def test_greedy_is_argmax():
    for request, group in zip(
        tiny.requests(1)[:3], generate(tiny.requests(1)[:3], sampling=SamplingParams(temperature=0.0)), strict=True
    ):
        tokens, logps = tiny.reference(request, 0, seed=0, temperature=0)
        np.testing.assert_array_equal(group[0].tokens, tokens)
        np.testing.assert_allclose(group[0].logprobs, logps, atol=1e-5)


def test_logprobs_are_tempered_and_untruncated():
    requests = tiny.requests(2)[:3]
    groups = generate(requests, sampling=SamplingParams(temperature=0.7, top_k=5, top_p=0.9))
    for request, group in zip(requests, groups, strict=True):
        for c in group:
            z = tiny.all_logits([*request.prompt, *c.tokens])[len(request.prompt) - 1 : -1] / 0.7
            full = (
                z
                - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True))
                - z.max(-1, keepdims=True)
            )
            np.testing.assert_allclose(c.logprobs, full[np.arange(c.length), c.tokens], atol=1e-5)
            ranks = (z > z[np.arange(c.length), c.tokens][:, None]).sum(-1)
            assert ranks.max() < 5


def test_top_k_draws_what_the_reference_draws():
    def top3(w):
        return np.where(w >= np.sort(w)[-3], w, 0)

    request = dataclasses.replace(tiny.requests()[1], samples=2)
    group = generate([request], sampling=SamplingParams(top_k=3))[0]
    for sample, c in enumerate(group):
        np.testing.assert_array_equal(c.tokens, tiny.reference(request, sample, seed=11, filtered=top3)[0])


def test_min_tokens_holds_the_end_back():
    bias = np.zeros(tiny.CONFIG.vocab_size, np.float32)
    bias[tiny.EOS[0]] = 50.0  # always wants to end
    free, held = generate(
        [
            Request(np.array([9], np.int32), 4, 12, 1),
            Request(np.array([9], np.int32), 4, 12, 1, min_tokens=5),
        ],
        sampling=SamplingParams(bias=bias),
    )
    assert {c.length for c in free} == {1} and {c.length for c in held} == {6}
    assert all(c.tokens[-1] == tiny.EOS[0] and c.finish == "eos" for c in held)


def test_banned_tokens_are_never_drawn():
    bias = np.full(tiny.CONFIG.vocab_size, -np.inf, np.float32)
    allowed = np.array([5, 130, 299])
    bias[allowed] = 0.0
    tokens = np.concatenate(
        [c.tokens for g in generate(tiny.requests(), sampling=SamplingParams(bias=bias)) for c in g]
    )
    assert set(tokens) == set(allowed)


def test_limits_may_differ_within_a_group():
    request = dataclasses.replace(tiny.requests()[0], max_tokens=[1, 4, 24])
    cut = generate([request])[0]
    for limit, short, full in zip([1, 4, 24], cut, baseline()[0], strict=True):
        np.testing.assert_array_equal(short.tokens, full.tokens[:limit])


def test_stop_sequences_end_a_completion_after_their_last_token():
    full = max(baseline()[0], key=lambda c: c.length)
    sample = next(i for i, c in enumerate(baseline()[0]) if c is full)
    at = full.length // 2
    stop = tuple(int(t) for t in full.tokens[at - 2 : at])
    cut = generate([dataclasses.replace(tiny.requests()[0], stop=((299, 299, 299), stop))])[0][sample]
    first = next(i for i in range(full.length) if tuple(full.tokens[i : i + 2]) == stop)
    np.testing.assert_array_equal(cut.tokens, full.tokens[: first + 2])
    np.testing.assert_allclose(cut.logprobs, full.logprobs[: first + 2], atol=1e-5)
    assert cut.finish == "stop"


def test_a_stop_sequence_that_began_before_the_cut_ends_the_completion():
    request = tiny.requests()[0]
    sample, full = max(enumerate(baseline()[0]), key=lambda pair: pair[1].length)
    for at in range(2, full.length - 1):
        stop = tuple(int(t) for t in full.tokens[at - 1 : at + 1])
        if next(i for i in range(full.length) if tuple(full.tokens[i : i + 2]) == stop) == at - 1:
            break  # one that does not occur before
    prompt = np.concatenate([request.prompt, full.tokens[:at]])
    one = dict(prompt=prompt, samples=1, max_tokens=request.limits[sample] - at, first_sample=sample, done=at, step=0)
    ((rest,),) = generate([dataclasses.replace(request, **one, stop=(stop,))])
    assert rest.tokens.tolist() == [full.tokens[at]] and rest.finish == "stop" and len(rest.logprobs) == 1


def test_the_callback_sees_every_token_in_order_and_may_stop():
    seen = {}

    def on_tokens(index, sample, tokens):
        seen.setdefault((index, sample), []).extend(tokens.tolist())
        return (index, sample) == (0, 1)

    groups = generate(tiny.requests(), on_tokens=on_tokens)
    for i, group in enumerate(groups):
        for j, c in enumerate(group):
            assert seen[i, j] == c.tokens.tolist()
            if (i, j) == (0, 1):
                full = baseline()[0][1].tokens
                np.testing.assert_array_equal(c.tokens, full[: c.length])
                assert c.finish in ("stop", "eos") and c.length <= 8
            else:
                np.testing.assert_array_equal(c.tokens, baseline()[i][j].tokens)


def test_prompt_logprobs():
    s, params = shared()
    prompts = [r.prompt for r in tiny.requests()]
    for prompt, logps in zip(prompts, s.prompt_logprobs(params, prompts), strict=True):
        z = tiny.all_logits(prompt).astype(np.float64)
        expected = z - np.log(np.exp(z).sum(-1, keepdims=True))
        np.testing.assert_allclose(logps, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-5)


def test_counts():
    s, _ = shared()
    groups = generate(tiny.requests())
    tokens = sum(c.length for g in groups for c in g)
    assert s.stats.tokens == tokens
    assert s.stats.prefill_tokens == sum(len(r.prompt) - 1 for r in tiny.requests())
    assert 0 < s.stats.utilisation <= 1 and s.stats.slot_steps >= tokens
    assert s.stats.seconds_total >= s.stats.seconds_decode > 0


def test_nothing_compiles_after_warm_up(caplog):
    s = tiny.sampler(slots=8, chunk=8, window=32, prefill_chunk=24)
    params = s.layout(tiny.params())
    assert s.warmup(params) > 0
    compiled = dict(s.shapes)
    programs = [getattr(s.programs, name) for name in ("decode", "prefill", "write_prompts", "resize")]
    sizes = [p._cache_size() for p in programs]
    with caplog.at_level(logging.WARNING):
        s.generate(params, tiny.requests(), seed=11)
        s.generate(params, tiny.requests(1)[:3] + tiny.requests(7)[3:], seed=12)
        assert s.shapes == compiled and not caplog.records
        assert sizes == [p._cache_size() for p in programs]  # what jax compiled is what was counted
        s.generate(params, tiny.requests()[:1], seed=1, sampling=SamplingParams(top_k=3))
        assert any("compiled decode" in r.getMessage() for r in caplog.records)


def test_no_requests_and_no_samples():
    assert generate([]) == []
    empty, some = generate([dataclasses.replace(tiny.requests()[0], samples=0), tiny.requests(1)[1]])
    assert empty == [] and len(some) == 1


@pytest.mark.parametrize(
    "request_, match",
    [
        (dict(prompt=np.zeros(0, np.int32)), "request 1: prompt of 0"),
        (dict(prompt=np.full(41, 9, np.int32)), "request 1: prompt of 41.*1..40"),
        (dict(max_tokens=0), "limit of 0"),
        (dict(max_tokens=25), "limit of 25.*1..24"),
        (dict(max_tokens=[1, 2]), "2,.*limits for 3 samples"),
        (dict(prompt=np.array([300], np.int32)), "outside the vocabulary, 0..299"),
        (dict(stop=((),)), "empty stop sequence"),
        (dict(stop=(5,)), "no tuple of tokens"),
        (dict(prompt=np.array([9.0])), "prompt tokens of float64"),
        (dict(key=-1), "request 1: key=-1: need 0 to 4294967295"),
        (dict(first_sample=2**32), "first_sample=4294967296"),
        (dict(samples=-1), "samples=-1"),
    ],
)
def test_bad_requests_are_named(request_, match):
    good = tiny.requests()[0]
    with pytest.raises(ValueError, match=match):
        generate([good, dataclasses.replace(good, **request_)])


@pytest.mark.parametrize(
    "field, value", [("temperature", -1), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 2)]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


def test_bad_bias_and_sizes():
    with pytest.raises(ValueError, match=r"bias has shape \(3,\)"):
        generate(tiny.requests(), sampling=SamplingParams(bias=np.zeros(3, np.float32)))
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny.requests(), sampling=SamplingParams(bias=np.full(300, -np.inf, np.float32)))
    with pytest.raises(ValueError, match="slots=0"):
        tiny.sampler(slots=0)


def test_buckets_grow_and_never_round_down():
    sizes = [bucket(n, 32) for n in range(1, 3000)]
    assert all(b >= n for n, b in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) < 25 and all(bucket(b, 32) == b for b in set(sizes))


def continued(groups, cut):
    """Requests for what is left of each completion of tiny.requests() after its first `cut` tokens, one each."""
    out = []
    for request, group in zip(tiny.requests(), groups, strict=True):
        for j, c in enumerate(group):
            done = min(cut, c.length - 1)
            prompt = np.concatenate([request.prompt, c.tokens[:done]])
            rest = request.limits[j] - done
            one = dict(prompt=prompt, samples=1, max_tokens=rest, first_sample=j, done=done, step=0)
            out.append(dataclasses.replace(request, **one))
    return out


@pytest.mark.parametrize("cut", [1, 7, 23])
def test_a_completion_continues_where_it_was_left(cut):
    requests = continued(baseline(), cut)
    rest = generate(requests, step=5)  # a later step; the keys are those of the step it began in
    for request, (got,), whole in zip(requests, rest, sum(baseline(), []), strict=True):
        np.testing.assert_array_equal(got.tokens, whole.tokens[request.done :])
        np.testing.assert_allclose(got.logprobs, whole.logprobs[request.done :], atol=1e-5)
        assert got.finish == whole.finish
    assert max(len(r.prompt) for r in requests) > tiny.MAX_PROMPT or cut == 1


def test_what_was_drawn_counts_towards_the_limits():
    r = tiny.requests()[0]
    begun = dataclasses.replace(r, prompt=np.array([9, 9, 9, 9, 9], np.int32), done=4, max_tokens=21)
    with pytest.raises(ValueError, match="prompt of 5, 4 of them drawn already and limit of 21.*limits of 1..20"):
        generate([begun])
    with pytest.raises(ValueError, match="request 0: prompt of 5, 5 of them"):
        generate([dataclasses.replace(begun, done=5, max_tokens=1)])


def test_background_requests_fill_slots_and_wait_for_nobody():
    requests = tiny.requests()
    alone = generate(requests[:2])
    steps = shared()[0].stats.slot_steps
    some = generate(requests, background=4)
    stats = dataclasses.replace(shared()[0].stats)
    tiny.same(some[:2], alone)  # the first two are finished, whatever else ran
    finishes = {c.finish for g in some[2:] for c in g}
    assert "partial" in finishes and stats.slot_steps < steps * 2
    drawn = [c for g in some[2:] for c in g]
    assert sum(c.length for c in drawn) > 10 and stats.tokens == sum(c.length for g in some for c in g)
    for got, whole in zip(drawn, sum(baseline()[2:], []), strict=True):  # what they have is what they would have had
        np.testing.assert_array_equal(got.tokens, whole.tokens[: got.length])
        assert got.finish == (whole.finish if got.length == whole.length else "partial")
    assert {c.finish for g in generate(requests, background=6) for c in g} == {"partial"}  # nothing must be finished


@pytest.mark.parametrize("S, P", [(96, 32), (96, 33), (64, 64), (24, 5)])
def test_prompts_and_windows_move_alike_in_blocks_and_in_columns(S, P):
    """At every end, the window's last column too."""
    programs, rng = sampler_programs(ProgramSpec(tiny.CONFIG, jnp.float32, 8, "cpu")), np.random.default_rng(0)
    pool, prompts = (rng.normal(size=(n, 2, w, 8)).astype(np.float32) for n, w in ((3, S), (2, P)))
    source, chosen = np.array([1, 0, 1], np.int32), np.array([True, False, True])
    for end in range(P, S + 1):
        plain = programs.write_prompts(jnp.array(pool), prompts, source, chosen, np.int32(end))
        blocks = programs.write_prompts(to_blocks(jnp.array(pool)), prompts, source, chosen, np.int32(end))
        np.testing.assert_array_equal(from_blocks(blocks), plain)
    expected = pool.copy()
    expected[[0, 2], :, S - P :] = prompts[1]
    np.testing.assert_array_equal(plain, expected)
    rows = np.array([2, 0], np.int32)
    for shift, window in ((0, S), (3, S), (-5, S), (0, S // 2), (P, 2 * S)):
        move = [programs.resize(a, rows, np.int32(shift), window=window) for a in (plain, blocks)]
        np.testing.assert_array_equal(from_blocks(move[1]), move[0])
