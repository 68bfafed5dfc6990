"""The reader of machine code, on text as cuobjdump prints it."""

from pallas_kernels.aot.kernel_cases import fma_weights
from pallas_kernels.aot.sass import Instruction, Loop, functions, hot_loop

TEXT = """
	code for sm_89
		Function : first_mosaic_gpu_kernel
	.headerflags	@"EF_CUDA_SM89 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM89)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
                                                                            /* 0x000fe400078e00ff */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;                  /* 0x0000000402047981 */
        /*0020*/                   FADD R3, R3, 1 ;                         /* 0x0000000402047981 */
        /*0030*/              @!P0 BRA 0x20 ;                               /* 0xfffffff000007947 */
        /*0040*/                   LDG.E.U8.CONSTANT R5, [R2.64] ;          /* 0x0000000402047981 */
        /*0050*/                   FFMA R3, R4, R5, R3 ;                    /* 0x0000000402047981 */
        /*0060*/                   FFMA2 R6, R8, R10, R6 ;                  /* 0x0000000402047981 */
        /*0070*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;              /* 0x0000000402047981 */
        /*0080*/               @P1 BRA 0x40 ;                               /* 0xfffffff000007947 */
        /*0090*/               @P2 BRA 0x10 ;                               /* 0xfffffff000007947 */
        /*00a0*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00b0*/                   BRA 0xb0;                                /* 0xfffffff000007947 */
        /*00c0*/                   NOP;                                     /* 0x0000000000007918 */
		..........

		Function : second
        /*0000*/                   LDG.E R4, [R2.64] ;                      /* 0x0000000402047981 */
        /*0010*/                   EXIT ;                                   /* 0x000000000000794d */
        /*0020*/                   BRA 0x20;                                /* 0xfffffff000007947 */
        /*0030*/                   NOP;                                     /* 0x0000000000007918 */
"""


def test_functions():
    found = functions(TEXT)
    assert {name: len(code) for name, code in found.items()} == {
        "first_mosaic_gpu_kernel": 13,
        "second": 4,
    }
    branch = found["first_mosaic_gpu_kernel"][3]
    assert (branch.address, branch.name, branch.jump) == (0x30, "BRA", 0x20)


def test_the_hot_loop_is_the_largest_innermost_one():
    """The outer loop, from 0x10 to 0x90, holds two others; of these the second is the larger."""
    loop = hot_loop(functions(TEXT)["first_mosaic_gpu_kernel"])
    assert not loop.whole_kernel
    assert [i.address for i in loop.instructions] == [0x40, 0x50, 0x60, 0x70, 0x80]
    assert loop.opcodes == {"LDG": 1, "FFMA": 1, "FFMA2": 1, "UIADD3": 1, "BRA": 1}
    assert loop.float32_fmas == 3
    assert loop.global_bytes == 1


def test_the_hot_loop_is_the_one_that_does_the_work_asked_for():
    """By additions it is the first loop, which is the shorter one; ties go to the longer one."""
    code = functions(TEXT)["first_mosaic_gpu_kernel"]
    adding = hot_loop(code, lambda loop: loop.opcodes.get("FADD", 0))
    assert [i.address for i in adding.instructions] == [0x20, 0x30]
    assert hot_loop(code, lambda loop: 1) == hot_loop(code)


def test_a_kernel_without_loops_counts_as_a_whole():
    loop = hot_loop(functions(TEXT)["second"])
    assert loop.whole_kernel
    assert [i.name for i in loop.instructions] == ["LDG", "EXIT"]
    assert loop.global_bytes == 4
    assert loop.vector_bytes == 0
    first = functions(TEXT)["first_mosaic_gpu_kernel"]
    assert Loop(first, whole_kernel=True).vector_bytes == 16


def test_a_loop_with_special_functions_uses_up_no_weights():
    decodes = Loop(tuple(Instruction(16 * i, "FFMA", "") for i in range(4)), whole_kernel=False)
    gates = Loop((*decodes.instructions, Instruction(64, "MUFU.EX2", "")), whole_kernel=False)
    assert fma_weights(2, decodes) == 2
    assert fma_weights(2, gates) == 0
