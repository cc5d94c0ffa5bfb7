"""The portable attention against float64 NumPy; test_splash.py compares the TPU kernel with it."""

import jax
import numpy as np
import pytest

from models.attention import (
    attend,
    attend_packed,
    from_blocks,
    resolve_implementation,
    segment_mask,
    to_blocks,
    write_keys,
)


def reference(q, k, v, segment_ids, window=1000):
    """float64, one query at a time. q: [B, T, N, H]; k, v: [B, T, K, H]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        group = n // (q.shape[2] // k.shape[2])
        seen = np.flatnonzero(segment_ids[b, : t + 1] == segment_ids[b, t])
        seen = seen[seen > t - window]
        scores = k[b, seen, group] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, group]
    return out


def random_inputs(T, N, K, H):
    random = np.random.RandomState(0)
    q, k, v = (random.standard_normal((2, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    segment_ids = np.ones((2, T), np.int32)
    segment_ids[0, T // 3 :] = 2
    segment_ids[1, 5:] = 2
    segment_ids[1, T - 7 :] = 0  # padding
    return 2 * q, k, v, segment_ids


@pytest.mark.parametrize("N, K", [(4, 4), (4, 2), (6, 1)])
def test_xla_matches_numpy(N, K):
    q, k, v, segment_ids = random_inputs(19, N, K, 8)
    with jax.default_matmul_precision("highest"):
        out = np.asarray(attend_packed(q, k, v, segment_ids, "xla"))
    assert np.isfinite(out).all()
    real = segment_ids > 0
    assert np.abs(out - reference(q, k, v, segment_ids))[real].max() < 1e-5


def test_each_kind_of_layer_sees_its_window():
    q, k, v, segment_ids = random_inputs(19, 4, 2, 8)
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda kind: attend_packed(q, k, v, segment_ids, "xla", windows=(3, 0, 100), kind=kind))
        for kind, window in enumerate((3, 1000, 100)):
            want = reference(q, k, v, segment_ids, window)
            assert np.abs(np.asarray(run(kind)) - want)[segment_ids > 0].max() < 1e-5
        alone = attend_packed(q, k, v, segment_ids, "xla", windows=(3,))
        assert np.abs(np.asarray(alone) - reference(q, k, v, segment_ids, 3))[segment_ids > 0].max() < 1e-5


@pytest.mark.parametrize("window", [0, 4])
def test_the_last_tokens_of_rows_whose_first_ones_are_known(window):
    q, k, v, segment_ids = random_inputs(19, 4, 2, 8)
    whole = attend_packed(q, k, v, segment_ids, "xla", windows=(window,))
    part = attend_packed(q[:, 12:], k, v, segment_ids, "xla", windows=(window,))
    np.testing.assert_allclose(part, whole[:, 12:], atol=1e-6)


@pytest.mark.parametrize("blocks", [False, True])
def test_int8_keys_and_values_match_numpy(blocks):
    q, k, v, segment_ids = random_inputs(19, 4, 2, 8)
    size = np.logspace(-1, 1, 19)[:, None, None]  # every token and head needs its own scale
    quantised = []
    for x in (k * size, v * size[::-1]):
        scale = np.abs(x.astype(np.float64)).max(-1) / 127
        quantised += [np.rint(x / scale[..., None]).astype(np.int8), scale]
    k, of_k, v, of_v = quantised
    expected = reference(q, k * of_k[..., None], v * of_v[..., None], segment_ids)
    with jax.default_matmul_precision("highest"):
        scales = [s.transpose(0, 2, 1).astype(np.float32) for s in (of_k, of_v)]
        k = k.transpose(0, 2, 1, 3)
        k = to_blocks(k, 1) if blocks else k
        out = attend(q, k, v.transpose(0, 2, 1, 3), segment_mask(segment_ids), scales)
    assert out.dtype == q.dtype and np.isfinite(out).all()
    assert np.abs(out - expected)[segment_ids > 0].max() < 1e-4  # of values up to 30


@pytest.mark.parametrize("S, n", [(96, 32), (12, 4), (7, 1)])
def test_keys_in_blocks_are_the_same_keys(S, n):
    """Written one column or several at a time, at any place, and attended to."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 3, S, 8)).astype(np.float32)
    blocks = to_blocks(plain)
    assert blocks.shape == (2, 3, S // n, 8, n)
    np.testing.assert_array_equal(from_blocks(blocks), plain)
    for end, T in ((0, 1), (S - 1, 1), (S // 2, 1), (S // 2 - 1, 3), (0, S)):
        new = rng.normal(size=(2, 3, T, 8)).astype(np.float32)
        plain[:, :, end : end + T] = new
        blocks = write_keys(blocks, new, end)
        np.testing.assert_array_equal(from_blocks(blocks), plain)
    q, v = rng.normal(size=(2, 2, 6, 8)).astype(np.float32), rng.normal(size=plain.shape).astype(np.float32)
    mask = np.arange(S) < np.array([[S // 2], [S]])[:, :, None]
    mask = np.broadcast_to(mask, (2, 2, S))
    np.testing.assert_allclose(attend(q, blocks, v, mask), attend(q, plain, v, mask), rtol=1e-5, atol=1e-5)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="choose one of xla, cudnn, splash, triton"):
        attend_packed(*random_inputs(8, 2, 2, 8), "flash")


@pytest.mark.parametrize("name, platform, chosen", [
    ("auto", "cpu", "xla"), ("auto", "cuda", "cudnn"), ("auto", "gpu", "cudnn"), ("auto", "tpu", "splash"),
    ("triton", "gpu", "triton"), ("xla", "tpu", "xla"),
])
def test_what_runs_on_a_platform(name, platform, chosen):
    assert resolve_implementation(name, platform) == chosen


@pytest.mark.parametrize("name, platform", [("triton", "cpu"), ("cudnn", "tpu"), ("splash", "gpu")])
def test_what_does_not_run_on_a_platform(name, platform):
    with pytest.raises(ValueError, match=rf"^'{name}' does not run on {platform}: choose auto, .*xla$"):
        resolve_implementation(name, platform)


def test_triton_refuses_more_elements_than_it_can_count():
    shape = (2**11, 2**10)
    x, ids = jax.ShapeDtypeStruct((*shape, 8, 128), "bfloat16"), jax.ShapeDtypeStruct(shape, "int32")
    with pytest.raises(ValueError, match="2,147,483,648 elements of queries on a device"):
        jax.eval_shape(lambda q, ids: attend_packed(q, q, q, ids, "triton"), x, ids)
