"""The HLO reader against counts known in closed form: programs compiled here, and text as for a TPU."""

# ruff: noqa: E501

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.runtime import hardware, hlo
from models.config import DecoderConfig

pytestmark = pytest.mark.optimized


def compiled(f, *shapes):
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_matmul_flops():
    assert hlo.count(compiled(lambda a, b: a @ b, (8, 16), (16, 32))).flops == 2 * 8 * 16 * 32


def test_batched_contraction_flops():
    f = lambda a, b: jnp.einsum("bthd,bshd->bhts", a, b)  # noqa: E731
    assert hlo.count(compiled(f, (2, 5, 3, 7), (2, 6, 3, 7))).flops == 2 * (2 * 3 * 5 * 6 * 7)


def test_loop_bodies_count_as_often_as_they_run():
    def inner(x, w):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=3)[0]

    def f(x, w):
        return jax.lax.scan(lambda y, _: (inner(y, w), None), x, None, length=5)[0]

    text = compiled(f, (8, 16), (16, 16))
    counts = hlo.count(text)
    assert counts.flops == 15 * 2 * 8 * 16 * 16
    assert not counts.unknown_loops
    annotation = "known_trip_count"
    assert annotation in text, "CPU annotates loops; without the note the count must come from the condition"
    assert hlo.count(text.replace(annotation, "nothing")).flops == counts.flops


def test_a_loop_that_only_the_data_can_end_runs_as_often_as_the_caller_says():
    def f(x, w):
        return jax.lax.while_loop(lambda y: jnp.sum(y) > 0, lambda y: y @ w, x)

    text = compiled(f, (8, 16), (16, 16))
    one, ten = hlo.count(text), hlo.count(text, loop_trips=10)
    assert one.flops == 2 * 8 * 16 * 16 and ten.flops == 10 * one.flops
    assert len(ten.unknown_loops) == 1


def test_a_branch_counts_as_its_heaviest_side():
    def f(x, w, p):
        return jax.lax.cond(p[0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert hlo.count(compiled(f, (8, 16), (16, 16), (1,))).flops == 2 * 2 * 8 * 16 * 16


TPU = """HloModule m, is_scheduled=true

%cond (p: (u32[], bf16[4,8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(8)
  %p = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, backend_config={"lists":[]}
}

%body (p.1: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %p.1 = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p.1), index=1
  %next = u32[]{:T(128)} add(%i.1, %two)
  %gather = (bf16[4,8]{1,0:T(8,128)}, bf16[16,8]{1,0:T(8,128)}) all-gather-start(%x), channel_id=1, dimensions={0}
  %done = bf16[16,8]{1,0:T(8,128)} all-gather-done(%gather)
  %sum = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%x), channel_id=2, to_apply=%add
  %f = bf16[4,8]{1,0} fusion(%sum), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"100","lists":[]}
  ROOT %out = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%next, %f)
}

%fused (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %piece = bf16[32,8]{1,0} all-gather(%a), channel_id=7, dimensions={0}
  %same = bf16[32,8]{1,0} all-gather(%a), channel_id=7, dimensions={0}
  ROOT %c = bf16[4,8]{1,0} copy(%a), backend_config={"estimated_cycles":"99"}
}, execution_thread="sparsecore"

ENTRY %main (x.1: bf16[4,8], q: bf16[3,5,7], k: bf16[3,6,7]) -> bf16[3,5,6] {
  %x.1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %init = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%zero, %x.1)
  %loop = (u32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) while(%init), condition=%cond, body=%body
  %q = bf16[3,5,7]{2,1,0} parameter(1)
  %k = bf16[3,6,7]{2,1,0} parameter(2)
  %splash_mqa_fwd.1 = bf16[3,5,7]{1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{128}"
}}, metadata={op_name="attention"}
  ROOT %s = bf16[3,5,6]{2,1,0} convolution(%q, %k), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, dim_labels=0bf_0oi->0bf
}
"""


GROUPED = """\
HloModule g
ENTRY %main (x: bf16[64,32], w: bf16[4,32,16]) -> bf16[4,32,16] {
  %owner = s32[8]{0} parameter(0)
  %x = bf16[64,32]{1,0} parameter(1)
  %w = bf16[4,32,16]{2,1,0} parameter(2)
  %first = s32[4]{0} parameter(3)
  %y = bf16[64,16]{1,0} custom-call(%owner, %x, %w), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/experts_of_8/grouped_product/pallas_call"}
  ROOT %dw = bf16[4,32,16]{2,1,0} custom-call(%first, %first, %x, %y), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/transpose(jvp(experts_of_8))/grouped_sums/pallas_call"}
}
"""  # noqa: E501


def test_grouped_products_count_the_rows_of_the_experts_that_are_here():
    assert hlo.count(GROUPED).kernel_flops == 2 * (2 * 64 * 32 * 16) * 4 / 8


def test_tpu_text():
    counts = hlo.count(TPU)
    # i = 0, 2, 4, 6: four iterations; a fusion's inside is part of its own estimate
    assert counts.cycles == 400
    assert counts.collectives == {"all-gather": [8, 4 * (16 + 32) * 8 * 2], "all-reduce": [4, 4 * 4 * 8 * 2]}
    assert counts.blocking == (4, 4 * 4 * 8 * 2) and counts.collective_count == 12
    assert counts.kernels == {"splash_mqa_fwd": 1}
    assert counts.kernel_flops == 2 * (2 * 3 * 5 * 6 * 7) / 2
    # a batch dimension of 3 as a dilated window: each output meets exactly one input
    assert counts.flops == 2 * 3 * 5 * 6 * 7


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,4},{1,5}}, use_global_device_ids=true", [[0, 4], [1, 5]]),
        ("source_target_pairs={{0,1},{1,2}}", [[0, 1], [1, 2]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=1,'d'=2] {'b'}, x=1", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_groups_of_a_collective(attributes, groups):
    assert [sorted(g) for g in hlo._groups(attributes, 8)] == groups


def test_what_crosses_slices_is_counted_once_a_chip():
    """Four devices on two slices: groups inside, across, and all four, of which two share the sending."""
    text = TPU.replace("all-reduce(%x), channel_id=2,", "all-reduce(%x), channel_id=2, replica_groups={},")
    inside = text.replace("replica_groups={}", "replica_groups={{0,1},{2,3}}")
    across = text.replace("replica_groups={}", "replica_groups={{0,2},{1,3}}")
    payload, gathers = 4 * 4 * 8 * 2, 4 * (16 + 32) * 8 * 2 / 2  # those name no groups: all four
    for form, share in ((inside, 0), (across, 1), (text, 0.5)):
        counts = hlo.count(form, slices=(0, 0, 1, 1))
        assert (counts.far, counts.far_blocking) == (gathers + share * payload, share * payload)
        assert counts.blocking == (4, 0 if share else payload)
    assert hlo.count(across).far == 0


def test_shape_bytes():
    assert hlo.shape_bytes("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}") == 30
    assert hlo.shape_bytes("(f32[2]{0}, /*index=1*/pred[4]{0}, u32[])") == 16
    assert hlo.shape_bytes("f8e4m3fn[10]") == 10
    assert hlo.shape_bytes("s4[10]{0}") == 5


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v4", "v4"),
     ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA L4", "L4"),
     ("NVIDIA L40S", "L40S"), ("NVIDIA H200", "H200")],
)
def test_chip_of_device_kind(kind, name):
    assert hardware.chip(kind).name == name


def test_unknown_chip():
    assert hardware.chip("cpu") is None


def test_model_flops_match_a_compiled_forward_pass():
    from models.decoder import Decoder, abstract_params, logits

    config = DecoderConfig(vocab_size=96, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4,
                           num_kv_heads=2, head_dim=16)
    B, T = 2, 32
    params, _ = abstract_params(config)
    model = Decoder(config)

    def forward(params, tokens):
        return logits(params, model.apply({"params": params}, tokens, tokens)[0])

    text = jax.jit(forward).lower(params, jax.ShapeDtypeStruct((B, T), np.int32)).compile().as_text()
    expected = B * T * hardware.model_flops_per_token(config, context=T)  # dense attention sees all T
    assert hlo.count(text).flops == pytest.approx(expected, rel=1e-6)


MEMORY = """HloModule m

%takes (p: bf16[64,512], q: bf16[8,512], i: s32[]) -> (bf16[8,512], bf16[64,512]) {
  %p = bf16[64,512]{1,0} parameter(0)
  %q = bf16[8,512]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %s = bf16[8,512]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={8,512}
  %sum = bf16[8,512]{1,0} add(%s, %q)
  %u = bf16[64,512]{1,0} dynamic-update-slice(%p, %q, %i, %i)
  ROOT %t = (bf16[8,512]{1,0}, bf16[64,512]{1,0}) tuple(%sum, %u)
}

ENTRY %main (p: bf16[64,512], q: bf16[8,512], i: s32[]) -> bf16[8,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  %q = bf16[8,512]{1,0} parameter(1)
  %i = s32[]{:T(128)S(6)} parameter(2)
  %f = (bf16[8,512]{1,0:T(8,128)(2,1)S(1)}, bf16[64,512]{1,0}) fusion(%p, %q, %i), kind=kLoop, calls=%takes
  %near = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%f), index=0
  %cs = (bf16[64,512]{1,0:S(1)}, bf16[64,512]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %cd = bf16[64,512]{1,0:S(1)} copy-done(%cs)
  ROOT %o = bf16[8,512]{1,0} negate(%near)
}
"""


def test_bytes_are_those_of_main_memory():
    piece, whole = 2 * 8 * 512, 2 * 64 * 512
    fusion = piece + piece + piece  # slice and operand read, update written; the sum stays in vector memory
    assert hlo.count(MEMORY).bytes == fusion + whole + piece  # fetched to vector memory; result written


def test_bytes_of_a_plain_product():
    text = compiled(lambda a, b: a @ b, (8, 16), (16, 32))
    assert hlo.count(text).bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)
