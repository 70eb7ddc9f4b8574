from __future__ import annotations

import torch

from alibi_attention.backends.triton.launch import Launch


class Compiled:
    """Stands in for Triton's compiled kernel: takes every argument of the kernel, in order."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append((grid, arguments))


class Tuned:
    """Stands in for a tuned kernel, which asks for a grid with each tile it times and with the one it takes."""

    arg_names = ("x_ptr", "bias_ptr", "length", "BLOCK")

    def __init__(self, compiled):
        self.compiled, self.grids = compiled, []

    def __getitem__(self, grid):
        def launch(x, bias, **arguments):
            for block in (64, 32, 16):
                taken = grid({"x_ptr": x, "bias_ptr": bias, **arguments, "BLOCK": block})
            self.grids.append(taken)
            return self.compiled

        return launch


def make(compiled):
    kernel = Tuned(compiled)
    return kernel, Launch(kernel, lambda tile: tile["length"] // tile["BLOCK"], {"length": 128})


def test_the_second_launch_is_the_compiled_kernels_with_the_tile_that_was_chosen():
    compiled = Compiled()
    kernel, launch = make(compiled)
    first, second = torch.zeros(8), torch.zeros(8)
    launch(first, None)
    launch(second, None)
    assert kernel.grids == [(8,)]
    assert compiled.launches == [((8, 1, 1), (second.data_ptr(), None, 128, 16))]


def test_an_address_that_triton_would_compile_another_kernel_for_goes_by_way_of_triton():
    compiled = Compiled()
    kernel, launch = make(compiled)
    aligned, odd = torch.zeros(8), torch.zeros(8)[1:]
    launch(odd, None)  # is not what later launches are of
    launch(aligned, None)
    launch(odd, None)
    assert len(kernel.grids) == 3
    launch(aligned, aligned)
    assert len(kernel.grids) == 3
    assert len(compiled.launches) == 1


def test_the_interpreter_compiles_nothing_that_could_be_launched_again():
    kernel, launch = make(None)
    for _ in range(3):
        launch(torch.zeros(8), None)
    assert len(kernel.grids) == 3
