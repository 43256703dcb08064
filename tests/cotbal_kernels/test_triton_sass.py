"""Which loop a spill is in, on code written by hand; test_triton_ahead_of_time.py has real code."""

import pytest

pytest.importorskip("triton")

from cotbal_kernels.triton_kernels.sass import find_loops, parse, spills_in


def program(text: str) -> str:
    """Labels as they are, instructions with addresses, as the disassembler writes them."""
    lines = []
    for at, line in enumerate(filter(None, (line.strip() for line in text.splitlines()))):
        lines.append(line if line.endswith(":") else f"        /*{16 * at:04x}*/                   {line} ;")
    return "\n".join(lines)


# Tiles (.L_x_0) around steps (.L_x_1); `{...}` are the places where a test spills.
PRODUCT = """
    S2R R0, SR_CTAID.X
    @P0 EXIT
    .L_x_0:
    {before}
    LDC R1, c[0x0][0x210]
    .L_x_1:
    {step}
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0
    @P1 BRA `(.L_x_3)
    .L_x_2:
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    @!P2 BRA `(.L_x_1)
    {epilogue}
    STG.E desc[UR6][R2.64], R24
    BRA.U UP0, `(.L_x_0)
    EXIT
    .L_x_3:
    {cold}
    BRA `(.L_x_2)
    .L_x_4:
    BRA `(.L_x_4)
    NOP
"""


def spills(**places: str) -> tuple[int, int]:
    """In all, and in the one main loop."""
    everywhere = dict.fromkeys(("before", "step", "epilogue", "cold"), "")
    found = spills_in(program(PRODUCT.format(**everywhere | places)))
    assert found["main_loops"] == 1
    return found["spills"], found["loop_spills"]


@pytest.mark.parametrize(("place", "in_loop"), [("before", False), ("step", True), ("epilogue", False), ("cold", True)])
@pytest.mark.parametrize(
    ("spill", "size"),
    [("STL.64 [R1+0x8], R2", 8), ("LDL R2, [R1]", 4), ("@P3 LDL.LU.128 R2, [R1+0x10]", 16), ("STL.U8 [R1], R2", 1)],
)
def test_only_the_innermost_loop_counts(place: str, in_loop: bool, spill: str, size: int) -> None:
    """Out-of-line code that comes back into the loop is part of it."""
    assert spills(**{place: spill}) == (size, size * in_loop)
    assert spills() == (0, 0)


def test_loops_are_nested() -> None:
    loops = sorted(find_loops(parse(program(PRODUCT.format(before="", step="", epilogue="", cold="")))), key=len)
    assert len(loops) == 2  # what nobody can reach is no loop
    assert loops[0] < loops[1]


def test_without_matrix_instructions_the_loop_of_multiply_adds_counts() -> None:
    code = """
    .L_x_0:
    FFMA R1, R2, R3, R1
    STL [R1], R2
    BRA `(.L_x_0)
    """
    busy = """
    .L_x_1:
    FFMA R1, R2, R3, R1
    FFMA R4, R2, R3, R4
    LDL R2, [R1]
    LDL R3, [R1+0x4]
    @P0 BRA `(.L_x_1)
    EXIT
    """
    found = spills_in(program(code.replace("BRA", "@P0 BRA") + busy))
    assert found == {"spills": 12, "main_loops": 1, "loop_spills": 8}
    found = spills_in(program("FADD R1, R2, R3\nSTL [R1], R2\nEXIT"))
    assert found == {"spills": 4, "main_loops": 0, "loop_spills": 0}


@pytest.mark.parametrize(
    ("branch", "may_go_on"),
    [
        ("BRA `(.L_x_0)", False),
        ("@PT BRA `(.L_x_0)", False),
        ("@!P0 BRA `(.L_x_0)", True),
        ("BRA.U !UP1, `(.L_x_0)", True),
        ("BRA P2, `(.L_x_0)", True),
        ("CALL.REL.NOINC `(.L_x_0)", True),
        ("EXIT", False),
        ("@P0 EXIT", True),
    ],
)
def test_where_a_branch_leads(branch: str, may_go_on: bool) -> None:
    blocks = parse(program(f".L_x_0:\nNOP\n{branch}\nFADD R1, R1, R1\nEXIT"))
    assert blocks[1].operations == ["FADD", "EXIT"]
    assert (1 in blocks[0].successors) == may_go_on
    assert (0 in blocks[0].successors) == ("`" in branch)
