"""A whole training step, in small sizes on the CPU."""

import pytest
import torch


@pytest.fixture
def step_gpu(script):
    return script("step_gpu")


def run(step_gpu, folder, *words):
    return step_gpu.main(["--device=cpu", f"--results={folder}", "--rows=2", "--rounds=1", *words])


def eager(step_gpu):
    """All contenders but the one that is compiled, which takes a minute."""
    return ["--only", step_gpu.OURS, step_gpu.BALANCED, step_gpu.DENSE, step_gpu.THEIRS]


def test_small_steps_of_eager_contenders(step_gpu, script, tmp_path, capsys):
    assert run(step_gpu, tmp_path, "--profile", *eager(step_gpu)) == 0
    result = script("record").load("step_gpu", tmp_path)
    rows = result["contenders"]
    assert list(rows) == eager(step_gpu)[1:]
    for row in rows.values():
        tokens = row["step_ms"] / 1e3 * row["tokens_per_second"]
        assert tokens == pytest.approx(2 * 16, rel=1e-3)
        assert sum(row["profile"]["parts"].values()) == pytest.approx(1, abs=1e-3)
        assert row["profile"]["kernels"]
    ours, dense = rows[step_gpu.OURS], rows[step_gpu.DENSE]
    router = 2 * 8 * 32  # layers, experts, width
    assert ours["num_active_params"] == dense["num_active_params"] + router
    assert ours["num_params"] > dense["num_params"] == dense["num_active_params"]
    assert [aim["wanted"] for aim in result["aims"]] == [
        "at least 1.3",
        "at least 0.9",
        "at most 1.25",
    ]
    assert "aten::mm" in capsys.readouterr().out

    run(step_gpu, tmp_path, "--only", step_gpu.DENSE)
    again = script("record").load("step_gpu", tmp_path)
    assert again["contenders"][step_gpu.OURS] == ours
    assert step_gpu.DENSE not in again["earlier"][0]["of"]
    page = script("page").render(tmp_path)
    assert "## A training step on one GPU" in page
    assert "Where the device's time goes, expertmesh, by kernels' names:" in page

    run(step_gpu, tmp_path, "--only", step_gpu.DENSE, "--layers=1")
    other = script("record").load("step_gpu", tmp_path)
    assert list(other["contenders"]) == [step_gpu.DENSE]
    assert other["aims"] == []


@pytest.mark.slow
def test_a_small_step_compiled(step_gpu, script, tmp_path):
    assert run(step_gpu, tmp_path, "--only", step_gpu.COMPILED) == 0
    (row,) = script("record").load("step_gpu", tmp_path)["contenders"].values()
    assert row["tokens_per_second"] > 0


@pytest.mark.slow
def test_float32_parameters_and_micro_batches_have_a_file_of_their_own(step_gpu, script, tmp_path):
    run(step_gpu, tmp_path, "--float32", "--micro-batches=2", *eager(step_gpu))
    result = script("record").load("step_gpu_float32", tmp_path)
    assert result["micro_batches"] == 2
    assert len(result["contenders"]) == 4
    for row in result["contenders"].values():
        tokens = row["step_ms"] / 1e3 * row["tokens_per_second"]
        assert tokens == pytest.approx(2 * 2 * 16, rel=1e-3)
    assert "2 x 2 x 16 tokens a step" in script("page").render(tmp_path)


def test_balanced_by_force_is_balanced(step_gpu):
    _, _, balanced, *_ = step_gpu.contenders(step_gpu.TINY)
    bench = step_gpu.Bench(torch.device("cpu"), rows=2, length=16, rounds=1, profile=False)
    stepper = step_gpu.make_stepper(
        balanced.config, bench.device, precision="fp32", sequences=2, lr=1e-4, dtype=torch.bfloat16
    )
    batch = step_gpu.random_batch(balanced.config.vocab_size, 2, 16)
    routings = {}
    stepper.model(batch.tokens_BS, record=routings)
    assert len(routings) == 2
    for routing in routings.values():
        assert routing.load_E.tolist() == [2 * 16 * 2 / 8] * 8


def test_parameters_are_bfloat16_and_routers_not(step_gpu):
    stepper = step_gpu.make_stepper(
        step_gpu.contenders(step_gpu.TINY)[0].config,
        torch.device("cpu"),
        precision="fp32",
        sequences=2,
        lr=1e-4,
        dtype=torch.bfloat16,
    )
    types = {name: p.dtype for name, p in stepper.model.named_parameters()}
    assert {t for name, t in types.items() if "router" in name} == {torch.float32}
    assert {t for name, t in types.items() if "router" not in name} == {torch.bfloat16}


def test_aims_of_the_whole_model(step_gpu):
    speeds = {
        step_gpu.OURS: 45_000.0,
        step_gpu.COMPILED: 46_000.0,
        step_gpu.BALANCED: 52_000.0,
        step_gpu.DENSE: 54_000.0,
        step_gpu.THEIRS: 30_000.0,
    }
    rows = {who: {"tokens_per_second": speed} for who, speed in speeds.items()}
    aims = step_gpu.aims(rows, whole=True)
    assert [aim["met"] for aim in aims] == [True, True, False, True]
    assert [aim["found"] for aim in aims] == [46_000.0, 1.5, 0.865, 1.2]
    rows[step_gpu.THEIRS] = {"error": "out of memory"}
    assert len(step_gpu.aims(rows, whole=False)) == 2
    assert step_gpu.aims({step_gpu.OURS: {"error": "out of memory"}}, whole=True) == []


def test_what_does_not_fit_or_is_not_installed_is_a_result(step_gpu, script):
    def fails(_):
        raise ImportError("no module\nmore")

    found = script("alone").alone(fails, step_gpu.contenders(step_gpu.TINY)[-1])
    assert found == {"error": "no module"}


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("_ZN7cutlass13device_kernelI5flash", "attention"),
        ("pytorch_flash::flash_bwd_kernel", "attention"),
        ("dhidden_turns_kernel", "experts"),
        ("up_kernel", "experts"),
        ("cutlass::device_kernel<at::cuda::detail::GroupProblemShape>", "experts"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and clipping"),
        ("_gates_kernel", "router and losses of balance"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "other products"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("vectorized_elementwise_kernel", "everything else"),
    ],
)
def test_parts_by_the_names_of_kernels(script, kernel, part):
    assert script("profiled").part_of(kernel) == part


def test_time_in_which_anything_ran(script):
    covered = script("profiled").covered
    assert covered([]) == 0
    assert covered([(0, 2), (5, 6)]) == 3
    assert covered([(1, 4), (0, 2), (3, 3.5), (4, 5)]) == 5
