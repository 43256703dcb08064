"""Every kernel of a training step compiles for GPUs that are not here, with the tiles it would have there."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from cotbal_kernels.triton_kernels import ahead_of_time
from cotbal_kernels.triton_kernels.ahead_of_time import FEATURES, PLAIN, Resources

PRODUCTS = ("project", "grad_hidden", "grad_weight")
INSTRUCTIONS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
# Bytes of shared memory in which every stage holds its two operands, (rows + columns) x depth x 2, of 128 x 256 x 64
# (sm_89: 128 x 128 x 32) tiles.
STAGE = {80: 49_152, 89: 16_384, 90: 49_152, 100: 49_152}
STAGES = {80: 2, 89: 3, 90: 3, 100: 3}  # mma.sync keeps one of its 3 (sm_89: 4) stages in registers
# Bytes a thread may spill in an epilogue, stores and loads together. With gradient, bias, soft cap or smoothing it
# needs more than 255 registers beside the 128 accumulators. It runs once per tile, after some 64 steps of D, and moves
# some 128 results per thread anyway. In the loop of those steps nothing may spill.
EPILOGUE = 1024
# Without options: some fifty registers.
FEW = 256


def compiled(capability: int, variants: str) -> dict[str, Resources]:
    """Resources by name of the launch."""
    launches = ahead_of_time.training_launches(capability, torch.bfloat16, VARIANTS[variants])
    return {launch.name: ahead_of_time.compile_launch(launch, capability) for launch in launches}


VARIANTS = {"plain": PLAIN, "features": FEATURES}


@pytest.mark.parametrize(
    ("capability", "variants"),
    [
        (90, "plain"),
        pytest.param(80, "plain", marks=pytest.mark.slow),
        pytest.param(89, "plain", marks=pytest.mark.slow),
        pytest.param(100, "plain", marks=pytest.mark.slow),
        pytest.param(90, "features", marks=pytest.mark.slow),
    ],
)
def test_training_step_compiles(capability: int, variants: str) -> None:
    """The device's own matrix instructions, operands of all stages in flight, no spills in the main loops."""
    found = compiled(capability, variants)
    kernels = {name.split(" ")[0] for name in found}
    assert kernels >= {"compact", "pack", "project", "row_losses", "dlogits", *PRODUCTS, "task_sums", "scale"}
    assert kernels >= {"logits_forward", "logits_backward"}
    for name, used in found.items():
        kernel = name.split(" ")[0]
        assert used.narrow_stores <= (kernel == "dlogits"), name  # the gradient at the target
        if kernel not in PRODUCTS:
            assert used.spills == used.stack == 0, name
            assert used.matrix_instructions == "none", name
            continue
        assert used.matrix_instructions == INSTRUCTIONS[capability], name
        if kernel == "project" or capability >= 90:
            assert used.shared >= STAGE[capability] * STAGES[capability], name
        assert used.main_loops == 1, name
        assert used.loop_spills == 0, name
        assert used.spills <= (EPILOGUE if variants == "features" and kernel == "project" else FEW), name


@pytest.mark.parametrize("capability", ahead_of_time.CAPABILITIES)
def test_what_is_compiled_is_what_is_launched(capability: int) -> None:
    """Recorded from the backend itself: every way of writing logits, descriptors from sm_90 on, aligned rows."""
    launches = ahead_of_time.training_launches(capability, torch.bfloat16, PLAIN + FEATURES)
    project = [launch for launch in launches if launch.kernel.__name__ == "project_kernel"]
    assert {launch.constexprs["WRITE"] for launch in project} == {0, 1, 2, 3}
    assert {launch.constexprs["USE_TMA"] for launch in project} == {capability >= 90}
    for launch in project:
        kind = launch.signature["weight_ptr"]
        assert kind == ("tensordesc<bf16[256,64]>" if capability >= 90 else "*bf16")
        assert {"width", "weight_stride", "out_stride"} <= launch.aligned
        assert not {"row_start", "vocab_stop"} & launch.aligned  # differ from slice to slice
    assert len({launch.key for launch in launches}) == len(launches)
    assert all(launch.options["enable_fp_fusion"] for launch in launches)  # whatever this Triton's default is


@pytest.mark.slow
@pytest.mark.parametrize("kernel", PRODUCTS)
@pytest.mark.parametrize("capability", [80, 90])
def test_float32_products_do_not_spill_in_their_loops(kernel: str, capability: int) -> None:
    """Their operands go through registers, all accumulators with them."""
    launches = ahead_of_time.training_launches(capability, torch.float32, PLAIN[:1])
    (launch,) = (launch for launch in launches if launch.kernel.__name__ == f"{kernel}_kernel")
    used = ahead_of_time.compile_launch(launch, capability)
    assert (used.matrix_instructions, used.main_loops) == ("none", 1)
    assert used.loop_spills == 0


def test_stores_of_single_values_are_seen() -> None:
    """The figure itself: rows of an odd length begin anywhere, and their values are stored one by one."""
    launches = ahead_of_time.training_launches(90, torch.bfloat16, PLAIN[:1])
    (launch,) = (launch for launch in launches if launch.kernel.__name__ == "project_kernel")
    odd = dataclasses.replace(launch, aligned=launch.aligned - {"out_stride"})
    assert ahead_of_time.compile_launch(odd, 90).narrow_stores >= 128


def test_a_spill_is_seen() -> None:
    """The figure itself: a tile whose accumulators alone are 256 registers of a thread does not fit."""
    launches = ahead_of_time.training_launches(80, torch.bfloat16, PLAIN[:1])
    (launch,) = (launch for launch in launches if launch.kernel.__name__ == "grad_weight_kernel")
    crowded = {**launch.constexprs, "BLOCK_V": 128, "BLOCK_D": 256, "BLOCK_M": 32}
    options = {"num_warps": 4, "num_stages": 2}
    too_large = ahead_of_time.Launch(launch.kernel, launch.signature, crowded, launch.aligned, options)
    used = ahead_of_time.compile_launch(too_large, 80)
    assert used.spills > 0
    assert used.loop_spills > EPILOGUE
