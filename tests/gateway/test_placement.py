"""Which devices each group gets, and what is refused, with the sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.config import ModelConfig
from engines.config_devices import Machine, num_gpus, visible_devices
from gateway.workers.placement import DoesNotFit, place


def model(name: str = "m", **fields: object) -> ModelConfig:
    given = {"model_name": name, "served_model_names": (name,), "model_path": "/m", "device": "cuda"}
    return ModelConfig.model_validate({**given, **fields})


def devices(*configs: ModelConfig, gpus: int, visible: tuple[str, ...] | None = None) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each group."""
    return [",".join(group.devices) for group in place(configs, Machine(gpus, 64, visible)).groups]


def test_documented_round_robin() -> None:
    assert devices(model(tp_size=4, num_replicas=2), gpus=8) == ["0,1,2,3", "4,5,6,7"]


def test_documented_device_ids() -> None:
    config = model(tp_size=2, num_replicas=2, device_ids=(2, 3, 4, 5))
    assert devices(config, gpus=8) == ["2,3", "4,5"]


def test_device_ids_keep_their_order() -> None:
    assert devices(model(tp_size=2, num_replicas=2, device_ids=(5, 1, 3, 2)), gpus=8) == ["5,1", "3,2"]


def test_custom_holds_its_devices_in_one_process() -> None:
    assert devices(model(parallel_type="custom", custom_devices=3), model("n"), gpus=4) == ["0,1,2", "3"]


def test_the_parents_visible_devices_are_what_ids_count() -> None:
    limited = ("4", "5", "6", "7")
    assert devices(model(tp_size=2, num_replicas=2), gpus=4, visible=limited) == ["4,5", "6,7"]
    assert devices(model(tp_size=2, device_ids=(1, 3)), gpus=4, visible=limited) == ["5,7"]
    assert devices(model(), gpus=1, visible=("GPU-8f3a",)) == ["GPU-8f3a"]


def test_models_do_not_overlap_and_pinned_ones_choose_first() -> None:
    free, pinned = model("free", tp_size=2), model("pinned", tp_size=2, device_ids=(0, 1))
    assert devices(free, pinned, gpus=4) == ["2,3", "0,1"]


def test_one_configuration_given_twice_is_two_models() -> None:
    config = model(tp_size=2)
    assert devices(config, config, gpus=4) == ["0,1", "2,3"]


@pytest.mark.parametrize(
    ("configs", "gpus", "sums"),
    [
        (
            [model(tp_size=4, num_replicas=3)],
            8,
            ["m/2: needs 4 GPUs, 0 are free", "need 12", "0: m/0", "7: m/1"],
        ),
        (
            [model(tp_size=3, num_replicas=3)],
            8,
            ["m/2: needs 3 GPUs, 2 are free", "8 GPUs (0 to 7)", "need 9"],
        ),
        ([model(tp_size=4)], 2, ["m/0: needs 4 GPUs, 2 are free", "2 GPUs (0 to 1)"]),
        ([model(device_ids=(9,))], 8, ["deviceIds names [9]", "8 GPUs (0 to 7)", "remedy"]),
        ([model("a", device_ids=(1,)), model("b", device_ids=(1,))], 4, ["b/0: needs 1 GPU, 0", "1: a/0"]),
        ([model(tp_size=2, source="m.yaml")], 0, ["0 GPUs (none)", "deviceType: cpu", "--gpus N"]),
        ([model()], 0, ["needs 1 GPU, 0 are free", "remedy: give --device cpu, or"]),
        ([model(tp_size=2)], 1, ["needs 2 GPUs, 1 is free", "remedy: lower --replicas, --tp"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sums(
    configs: list[ModelConfig], gpus: int, sums: list[str]
) -> None:
    with pytest.raises(DoesNotFit) as caught:
        devices(*configs, gpus=gpus)
    assert all(part in str(caught.value) for part in [*sums, "remedy: "])


def test_every_group_that_does_not_fit_is_named() -> None:
    with pytest.raises(DoesNotFit) as caught:
        devices(model("a", tp_size=2), model("b", tp_size=2), model("c", tp_size=2), gpus=2)
    assert [line.split(":")[0] for line in str(caught.value).split("\n")] == ["b/0", "c/0"]


def test_sharing_up_to_the_whole() -> None:
    half = model(tp_size=2, num_replicas=2, share_devices=True, gpu_memory_share=0.5)
    assert devices(half, gpus=2) == ["0,1", "0,1"]
    tenths = model(num_replicas=10, share_devices=True, gpu_memory_share=0.1)
    assert devices(tenths, gpus=1) == ["0"] * 10


def test_sharing_prefers_empty_devices() -> None:
    assert devices(model(num_replicas=3, share_devices=True, gpu_memory_share=0.4), gpus=2) == ["0", "1", "0"]


def test_sharing_above_the_whole_is_refused() -> None:
    with pytest.raises(
        DoesNotFit, match=r"m/1: needs 1 GPU, 0 are free.*0: m/0 \(0\.6\).*lower gpuMemoryShare"
    ):
        devices(model(num_replicas=2, share_devices=True, gpu_memory_share=0.6), gpus=1)


def test_both_must_agree_to_share() -> None:
    with pytest.raises(DoesNotFit, match="n/0: needs 1 GPU, 0 are free"):
        devices(model(share_devices=True, gpu_memory_share=0.1), model("n", gpu_memory_share=0.1), gpus=1)


def test_cpu_groups_take_no_devices_and_warn_when_the_cores_run_out() -> None:
    config = model(device="cpu", tp_size=2, num_replicas=2, omp_threads=3)
    placement = place([config, model()], Machine(1, 8))
    assert [group.devices for group in placement.groups] == [(), (), ("0",)]
    assert [group.name for group in placement.groups] == ["m/0", "m/1", "m/0"]
    (warning,) = placement.warnings
    assert "12 threads on 8 cores (m: 2 x 2 ranks x 3 threads)" in warning
    assert place([config], Machine(0, 12)).warnings == ()


def test_cores_are_divided_over_the_ranks_that_state_no_threads() -> None:
    stated = model("a", device="cpu", omp_threads=4)
    pair = model("b", device="cpu", tp_size=2, num_replicas=2, omp_threads=16, is_omp_stated=False)
    one = model("c", device="cpu", omp_threads=16, is_omp_stated=False)
    placement = place([stated, pair, one], Machine(0, 16))
    assert [group.config.omp_threads for group in placement.groups] == [4, 2, 2, 2]
    assert placement.warnings == ()
    assert place([pair], Machine(0, 2)).groups[0].config.omp_threads == 1


_GROUPS = st.builds(
    model, tp_size=st.integers(1, 4), num_replicas=st.integers(1, 3), share_devices=st.booleans(),
    gpu_memory_share=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
)  # fmt: skip


@given(st.lists(_GROUPS, max_size=4), st.integers(0, 9))
def test_no_plan_puts_too_much_on_a_device(configs: list[ModelConfig], gpus: int) -> None:
    try:
        groups = place(configs, Machine(gpus, 64)).groups
    except DoesNotFit:
        return
    for device in map(str, range(gpus)):
        held = [group.config for group in groups if device in group.devices]
        shared = all(c.share_devices for c in held) and sum(c.gpu_memory_share for c in held) <= 1 + 1e-9
        assert len(held) <= 1 or shared
    assert all(len(set(group.devices)) == group.config.devices_per_group for group in groups)
    assert all(int(device) < gpus for group in groups for device in group.devices)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("4,5,6,7", ("4", "5", "6", "7")),
        (" 1 , 0 ", ("1", "0")),
        ("", ()),
        ("0,-1,2", ("0",)),
        ("GPU-1,MIG-2", ("GPU-1", "MIG-2")),
    ],
)
def test_visible_devices_as_cuda_reads_them(text: str, names: tuple[str, ...]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": text}) == names


def test_visible_devices_not_set() -> None:
    assert visible_devices({}) is None


def test_num_gpus_is_what_the_driver_lists_and_the_parent_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.config_devices.num_gpus_present", lambda: 8)
    assert num_gpus({}) == 8
    assert num_gpus({"CUDA_VISIBLE_DEVICES": "4,5"}) == 2
    assert num_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
