"""What a program sends and computes, from HLO text: of small texts, and of programs whose collectives are known."""

# ruff: noqa: E501  (HLO has long lines)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax

from dsjax.plan import hlo
from sharding.mesh import AXES, make_mesh

SIZES = (2, 2, 2, 1, 1, 1)  # data, fsdp, expert, context, tensor, stage

TPU_TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%cond (p: (s32[], bf16[64,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
  %p = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%async_piece.1 (w: bf16[32,128]) -> bf16[64,128] {
  %w.1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.1 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%w.1), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="3"}, metadata={op_name="step/gather"}
}

%async_piece.2 (w: bf16[32,128]) -> bf16[64,128] {
  %w.2 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %gather.2 = bf16[64,128]{1,0:T(8,128)(2,1)} all-gather(%w.2), channel_id=4, replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.9 (g: f32[8,128]) -> f32[4,128] {
  %g = f32[8,128]{1,0:T(8,128)} parameter(0)
  %sum.1 = f32[8,128]{1,0:T(8,128)} all-reduce(%g), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %part = f32[4,128]{1,0:T(8,128)} slice(%sum.1), slice={[0:4], [0:128]}
}

%called_computation.5 (e: bf16[2,128]) -> bf16[2,128] {
  %e = bf16[2,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %offloaded = bf16[2,128]{1,0:T(8,128)(2,1)} all-to-all(%e), channel_id=9, replica_groups=mesh['data'=2,'fsdp'=2,'expert'=2] {'expert'}, dimensions={0}
}, execution_thread="sparsecore"

%body (p: (s32[], bf16[64,128])) -> (s32[], bf16[64,128]) {
  %p.1 = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %w = bf16[32,128]{1,0:T(8,128)(2,1)} slice(%x), slice={[0:32], [0:128]}
  %start = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%async_piece.1
  %done = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%async_piece.2
  %kernel = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%done), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="step/kernel"}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %unknown = bf16[64,128]{1,0:T(8,128)(2,1)} copy(%kernel), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  %e.1 = bf16[2,128]{1,0:T(8,128)(2,1)} slice(%x), slice={[0:2], [0:128]}
  %call-start = ((), (), (s32[1]{0})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="offloaded", called_computations={%called_computation.5}
  %call-update = ((bf16[2,128]{1,0}), (bf16[2,128]{1,0}), (s32[1]{0})) custom-call-update(%call-start, %e.1)
  %call-done = bf16[2,128]{1,0:T(8,128)(2,1)} custom-call-done(%call-update)
  ROOT %next = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%i.1, %unknown)
}

ENTRY %main (x: bf16[64,128], g: f32[8,128]) -> bf16[64,128] {
  %x.1 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %init = (s32[]{:T(128)}, /*index=1*/bf16[64,128]{1,0:T(8,128)(2,1)}) tuple(%one, %x.1)
  %loop = (s32[]{:T(128)}, bf16[64,128]{1,0:T(8,128)(2,1)}) while(%init), condition=%cond, body=%body, metadata={op_name="step/while"}
  %scattered = f32[4,128]{1,0:T(8,128)} fusion(%g.1), kind=kCustom, calls=%all-reduce-scatter.9
  %sent = f32[4,128]{1,0:T(8,128)} collective-permute(%scattered), channel_id=6, source_target_pairs={{0,4},{1,5},{2,6},{3,7},{4,0},{5,1},{6,2},{7,3}}
  ROOT %out = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%loop), index=1
}
"""


def test_a_tpu_programs_loops_pieces_and_kernels_are_read():
    program = hlo.Program(TPU_TEXT)
    assert program.loops() == [("step/while", 6)]  # from 1 to 7
    found = {c.kind: c for c in hlo.collectives(program, AXES, SIZES)}
    gather = found.pop("all-gather")
    assert (gather.axes, gather.size, gather.times, gather.bytes) == (("fsdp",), 2, 6, 6 * 32 * 128 * 2)
    scatter = found.pop("reduce-scatter")
    assert (scatter.axes, scatter.times, scatter.bytes) == (("expert",), 1, 8 * 128 * 4 // 2)
    permute = found.pop("collective-permute")
    assert (permute.axes, permute.bytes) == (("data",), 4 * 128 * 4)
    offloaded = found.pop("all-to-all")  # to a SparseCore
    assert (offloaded.axes, offloaded.times, offloaded.bytes) == (("expert",), 6, 6 * 2 * 128 * 2 // 2)
    assert not found
    assert hlo.estimated_cycles(program) == 6000
    assert hlo.by_axis(hlo.collectives(program, AXES, SIZES)) == {"fsdp": 49152, "expert": 3584, "data": 2048}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("dimensions={0}", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_of_writing_groups_is_read(text, wanted):
    assert np.asarray(hlo.groups(text, 4)).tolist() == wanted


def compiled(f, mesh, *shapes):
    """The program of f on a mesh, its arguments laid out as (shape, spec) say."""
    with jax.set_mesh(mesh):
        arguments = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec)) for shape, spec in shapes
        ]
        return hlo.Program(jax.jit(f).lower(*arguments).compile().as_text())


def by_kind(program, mesh):
    found = hlo.collectives(program, mesh.axis_names, tuple(mesh.shape.values()))
    return {c.kind: c for c in found}


def test_a_real_programs_sums_in_a_loop_are_counted_by_axis():
    mesh = make_mesh(jax.devices()[:8], data=2, fsdp=4)

    def local(x):
        return lax.scan(lambda c, _: (jnp.sin(lax.psum(c, "fsdp")), None), x, None, length=5)[0]

    def f(x):
        return jax.shard_map(local, in_specs=P("data", None), out_specs=P("data", None), check_vma=False)(x)

    found = by_kind(compiled(f, mesh, ((16, 32), P("data", None))), mesh)
    assert set(found) == {"all-reduce"}
    one = found["all-reduce"]
    assert (one.axes, one.size, one.times) == (("fsdp",), 4, 5)
    assert one.bytes == 5 * 2 * 8 * 32 * 4 * 3 // 4


@pytest.mark.parametrize(
    ("kind", "collective", "sent"),
    [
        ("all-gather", lambda x: lax.all_gather(x, "expert", tiled=True), 2 * 32 * 4 * 3),
        ("reduce-scatter", lambda x: lax.psum_scatter(jnp.tile(x, (4, 1)), "expert", tiled=True), 8 * 32 * 4 * 3 // 4),
        ("all-to-all", lambda x: lax.all_to_all(jnp.tile(x, (2, 1)), "expert", 0, 0, tiled=True), 4 * 32 * 4 * 3 // 4),
        ("collective-permute", lambda x: lax.ppermute(x, "expert", [(i, (i + 1) % 4) for i in range(4)]), 2 * 32 * 4),
    ],
)
def test_each_kind_of_collective_is_counted_as_one_device_sends_it(kind, collective, sent):
    mesh = make_mesh(jax.devices()[:8], data=2, expert=4)

    def f(x):
        over = P(("data", "expert"), None)
        return jax.shard_map(collective, in_specs=over, out_specs=over, check_vma=False)(x)

    found = by_kind(compiled(f, mesh, ((16, 32), P(("data", "expert"), None))), mesh)
    assert set(found) == {kind}
    assert (found[kind].axes, found[kind].times, found[kind].bytes) == (("expert",), 1, sent)


def test_a_programs_matrix_products_are_counted_as_often_as_they_run():
    mesh = make_mesh(jax.devices()[:1])

    def f(x, w):
        return lax.scan(lambda c, _: (c @ w, None), x, None, length=3)[0]

    assert hlo.flops(compiled(f, mesh, ((8, 16), P()), ((16, 16), P()))) == 3 * 2 * 8 * 16 * 16


@pytest.mark.parametrize(
    ("a", "b", "y", "window", "flops"),
    [
        pytest.param(  # a batch of 4
            "4,8,16", "4,16,32", "4,8,32",
            "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf", 4 * 8 * 16 * 32, id="batch",
        ),
        pytest.param(  # 16 heads of one input: all taps but one meet padding
            "4,64,512,1", "16,256,512,1", "4,64,16,256",
            "window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f", 4 * 64 * 512 * 16 * 256,
            id="heads",
        ),
        pytest.param(  # 4 heads summed
            "8,4,16", "4,16,32", "8,1,32", "window={size=4}, dim_labels=b0f_0io->b0f", 8 * 4 * 16 * 32, id="sum",
        ),
        pytest.param(  # of 3 taps over 5 elements, the two ends meet padding once each
            "1,5,2", "3,2,4", "1,5,4", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (3 * 5 - 2) * 2 * 4, id="same",
        ),
        pytest.param("8,16", "16,32", "8,32", "dim_labels=bf_io->bf", 8 * 16 * 32, id="one product"),
    ],
)  # fmt: skip
def test_a_convolution_counts_what_meets_no_padding(a, b, y, window, flops):
    text = f"""\
ENTRY %main (a: f32[{a}], b: f32[{b}]) -> f32[{y}] {{
  %a = f32[{a}] parameter(0)
  %b = f32[{b}] parameter(1)
  ROOT %c = f32[{y}] convolution(%a, %b), {window}
}}
"""
    assert hlo.flops(hlo.Program(text)) == 2 * flops


@pytest.mark.parametrize(
    ("name", "result", "operands", "flops"),
    [
        ("grouped_matmul", "bf16[64,32]", ["s32[5]", "bf16[64,16]", "bf16[4,16,32]"], 64 * 16 * 32),
        ("grouped_matmul_gradient", "f32[4,16,32]", ["s32[5]", "bf16[64,16]", "bf16[64,32]"], 64 * 16 * 32),
        (
            "grouped_swiglu",
            "(bf16[64,32], bf16[64,32], bf16[64,32])",
            ["s32[5]", "bf16[64,16]", "f32[64,1]", "bf16[4,16,32]", "bf16[4,16,32]"],
            2 * 64 * 16 * 32,
        ),
        (
            "scaled_matmul_transposed",
            "bf16[64,32]",
            ["s32[5]", "f8e4m3fn[64,16]", "f32[64,1]", "f8e4m3fn[4,32,16]", "f32[4,1,1]"],
            64 * 16 * 32,
        ),
        ("quantise", "(f8e4m3fn[64,16], f32[1,64,1])", ["bf16[64,16]"], 0),
    ],
)
def test_kernels_count_at_all_their_rows(name, result, operands, flops):
    lines = [f"  %p{i} = {operand} parameter({i})" for i, operand in enumerate(operands)]
    places = ", ".join(f"%p{i}" for i in range(len(operands)))
    lines.append(f'  %{name}.7 = {result} custom-call({places}), custom_call_target="tpu_custom_call"')
    head = ", ".join(f"p{i}: {operand}" for i, operand in enumerate(operands))
    text = "\n".join([f"ENTRY %main ({head}) -> {result} {{", *lines, "}", ""])
    assert hlo.flops(hlo.Program(text)) == 2 * flops


def test_types_are_measured():
    assert hlo.type_bytes("(bf16[4,8]{1,0:T(8,128)(2,1)}, pred[3], f8e4m3fn[10], s32[])") == 64 + 3 + 10 + 4
