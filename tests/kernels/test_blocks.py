import triton

from expertmesh.kernels.blocks import ceil_div, power_of_2


def test_sizes_are_those_of_triton() -> None:
    for size in [*range(1, 1030), 4095, 4096, 4097, 2**31 - 1, 2**31 + 1]:
        assert power_of_2(size) == triton.next_power_of_2(size)
    for size in range(70):
        for block in range(1, 20):
            assert ceil_div(size, block) == triton.cdiv(size, block)
