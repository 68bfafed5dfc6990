# ruff: noqa: E501, lines of HLO are long
"""The reader of XLA's thunk sequences and HLO, on text as XLA writes it."""

from pallas_kernels.aot.launch_sequence import array_bytes, count, large_results

SEQUENCE = """\
001: kCopy         [source       | next=002 (1)] kCopy
002: kCustomCall   [prev=001 (1) | next=003 (1)] kCustomCall
003: kCustomKernel [prev=002 (1) | next=004 (1)] loop_add_fusion grid: [1, 1, 1] threads: [2, 1, 1]
004: kWhile        [prev=003 (1) | next=010 (1)]   
condition:
    005: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    006: kAsyncStart   [source       | next=009 (2)] stream=computation_stream[0], async_id=6
        007: kDynamicSliceFusion [source | sink] params=1, results=1
            008: kCopy [source | sink] kCopy
    009: kCustomKernel [prev=006 (1) | sink] gemm_fusion_dot grid: [1, 1, 1] threads: [1, 1, 1]
010: kWhile        [prev=004 (1) | next=013 (1)]   
condition:
    011: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    012: kCustomKernel [source | sink] loop_add_fusion.1 grid: [1, 1, 1] threads: [1, 1, 1]
013: kMemset32BitValue [prev=010 (1) | sink ] memset
"""

METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n'
    f'    thunk_id: {number}\n  }}\n  thunk_kind: "{kind}"\n}}\n'
    for number, kind, name in [
        (1, "kCopy", "copy.1"),
        (2, "kCustomCall", "attend.2"),
        (4, "kWhile", "while.4"),
        (7, "kDynamicSliceFusion", "slice_fusion.7"),
        (10, "kWhile", "while.10"),
    ]
)

HLO = """\
HloModule jit_f, is_scheduled=true

%inside (p: bf16[4096,1024]) -> bf16[4096,1024] {
  %p = bf16[4096,1024]{1,0} parameter(0)
  %row = bf16[1,1024]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %update = bf16[4096,1024]{1,0} dynamic-update-slice(%p, %row, %at, %at)
  ROOT %cast = bf16[4096,1024]{1,0} bitcast(%update)
}

%decodes (p.1: s8[4096,1024]) -> bf16[4096,1024] {
  %p.1 = s8[4096,1024]{1,0} parameter(0)
  ROOT %convert = bf16[4096,1024]{1,0} convert(%p.1)
}

%sliced (p.2: bf16[6,2560]) -> bf16[1,2560] {
  ROOT %slice_fusion.7 = bf16[1,2560]{1,0} fusion(%p.2), kind=kLoop, calls=%one_slice
}

%body (t: (s32[], bf16[6,2560])) -> (s32[], bf16[6,2560]) {
  %start = ((bf16[6,2560]{1,0}), bf16[1,2560]{1,0}) async-start(%t), calls=%sliced
  %weights = bf16[4096,1024]{1,0} fusion(%t), kind=kLoop, calls=%decodes, metadata={op_name="jit(f)/while/body/convert"}
}

ENTRY %main (cache: bf16[4096,1024], x: f32[]) -> bf16[4096,1024] {
  %cache = bf16[4096,1024]{1,0} parameter(0)
  %copy.1 = bf16[4096,1024]{1,0:T(8,128)} copy(%cache)
  %attend.2 = (bf16[4096,1024]{1,0}, f32[8]{0}) custom-call(%copy.1), custom_call_target="mosaic_gpu_v2", output_to_operand_aliasing={{0}: (0, {})}, metadata={op_name="jit(f)/attend"}
  %many = (f32[300,300]{1,0}, f32[300,300]{1,0}, /*index=2*/f32[300,300]{1,0}) fusion(%x), kind=kLoop, calls=%zeros
  %in_place = bf16[4096,1024]{1,0} fusion(%copy.1), kind=kLoop, calls=%inside
  %while.4 = (s32[], bf16[6,2560]{1,0}) while(%tuple), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  ROOT %while.10 = (s32[], bf16[6,2560]{1,0}) while(%tuple), condition=%c, body=%other, backend_config={}
}
"""


def test_launches_are_counted_by_kind_and_trip_count():
    counted = count(SEQUENCE, METADATA, HLO)
    assert counted.launch_kinds == {
        "copy": 1 + 6,
        "gemm fusion": 6,
        "kernel": 2,
        "mosaic": 1,
        "memset": 1,
    }
    assert counted.launches == 17
    assert counted.unknown_loops == 1


def test_copies_have_names_and_sizes():
    outside, inside = count(SEQUENCE, METADATA, HLO).copies
    assert (outside.instruction, outside.shape) == ("copy.1", "bf16[4096,1024]")
    assert (outside.bytes, outside.times) == (8 << 20, 1)
    assert (inside.instruction, inside.bytes, inside.times) == ("slice_fusion.7", 5120, 6)


def test_the_sequence_names_every_launch():
    sequence = count(SEQUENCE, METADATA, HLO).sequence
    assert sequence[:2] == ("copy copy.1: ", "mosaic attend.2: jit(f)/attend")
    assert sequence[3] == "copy x 6 slice_fusion.7: "
    assert len(sequence) == 7


def test_large_results_are_what_is_written_outside_the_inputs():
    """Not the update in place, not the custom call with an alias, not the loops' tuples."""
    found = {r.instruction: r for r in large_results(HLO)}
    assert set(found) == {"copy.1", "weights"}
    assert found["weights"].source == "jit(f)/while/body/convert"
    assert found["weights"].operation == "fusion"
    assert found["copy.1"].bytes == 8 << 20


def test_sizes_of_shapes():
    assert array_bytes("s32[]") == 4
    assert array_bytes("(bf16[2,3]{1,0}, pred[5]{0}, f32[])") == 12 + 5 + 4
    assert array_bytes("s4[8,2]{1,0:E(4)}") == 8
    assert array_bytes("f8e4m3fn[16]{0}") == 16
