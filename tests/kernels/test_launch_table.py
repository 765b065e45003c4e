"""Measured launch configurations: how they are found, read and written. No GPU is needed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import apply64, apply_eager, assert_within_rule, heads, stored_map
from kernel_checks import text_probabilities as probabilities

from hgc_kernels import launch_table
from hgc_kernels.ops.apply_map import launch as apply_map
from hgc_kernels.ops.apply_map_project import launch as apply_map_project
from hgc_kernels.ops.attend_and_store import launch as attend_and_store

OPS = Path(__file__).resolve().parents[2] / "benchmarks" / "ops"
CPU = torch.device("cpu")
CALL = (torch.float16, torch.float16, 37, 77, 40)
BUCKET = "float16, map float16, over 32 queries, 64 keys, head 64"


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Makes the CPU a device with a file of its own; the value writes it."""
    monkeypatch.setattr(launch_table, "FOLDER", tmp_path)
    monkeypatch.setattr(launch_table, "device_name", lambda device: "A GPU (80 GB)")
    launch_table._configs_of.cache_clear()

    def write(configs, text=None):
        path = tmp_path / "a-gpu-80-gb.json"
        path.write_text(text or json.dumps({"device": "A GPU (80 GB)", "configs": configs}))
        launch_table._configs_of.cache_clear()
        return path

    yield write
    launch_table._configs_of.cache_clear()


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(OPS))
    yield importlib.import_module("tune")
    del sys.modules["tune"]


def test_the_heuristic_serves_what_was_not_measured(device):
    chosen = apply_map.heuristic(*CALL)
    measured = launch_table.measured
    assert measured("apply_map", CPU, apply_map.bucket(*CALL), chosen) is chosen  # no file
    device({"apply_map": {BUCKET: {"block_m": 128, "num_warps": 8}}})
    found = measured("apply_map", CPU, apply_map.bucket(*CALL), chosen)
    assert (found.block_m, found.num_warps) == (128, 8)
    assert (found.block_n, found.block_d, found.num_stages) == (
        chosen.block_n, chosen.block_d, chosen.num_stages,
    )  # fmt: skip
    few = apply_map.bucket(*CALL[:2], 32, *CALL[3:])
    assert measured("apply_map", CPU, few, chosen) is chosen
    assert measured("attend_and_store", CPU, apply_map.bucket(*CALL), chosen) is chosen


def test_a_processor_has_no_file():
    assert launch_table.device_name(CPU) is None
    assert launch_table._configs_of(CPU) == {}


def test_a_file_is_read_once(device, monkeypatch):
    device({"apply_map": {BUCKET: {"block_m": 32}}})
    read, times = launch_table.read, []
    monkeypatch.setattr(launch_table, "read", lambda path: times.append(path) or read(path))
    for _ in range(3):
        chosen = apply_map.heuristic(*CALL)
        launch_table.measured("apply_map", CPU, apply_map.bucket(*CALL), chosen)
    assert len(times) == 1


@pytest.mark.parametrize("form", ["folded", "two_stage"])
def test_what_the_heuristic_tells_apart_has_a_bucket_of_its_own(form):
    """Two calls in one bucket have one heuristic configuration."""
    seen = {}
    for dtype in (torch.float16, torch.float32):
        for s_q in (1, 32, 33, 512, 513, 4096):
            for size in (40, 64, 80, 160):
                for s_kv in (4, 16, 40, 77, 129, 300):
                    call = (dtype, torch.float16, s_q, s_kv, size)
                    project = apply_map_project.heuristic(*call[:2], 2, s_q, s_kv, 8, size, 640)
                    for name, config in (
                        (("map", *apply_map.bucket(*call)), apply_map.heuristic(*call)),
                        (
                            ("attend", *attend_and_store.bucket(dtype, s_q, s_kv, size)),
                            attend_and_store.heuristic(dtype, s_q, s_kv, size),
                        ),
                        (
                            ("project", *apply_map_project.bucket(project, *call[:3])), project,
                        ),
                    ):  # fmt: skip
                        key = launch_table.name_of(name)
                        assert seen.setdefault(key, config) == config, key


@pytest.mark.usefixtures("interpreted")
def test_a_kernel_runs_with_what_was_measured(device, monkeypatch):
    device({"apply_map": {BUCKET: {"block_m": 16, "block_n": 32}}})
    v = heads(2, 77, 2, 40, torch.float16)
    map = stored_map(probabilities(2, 37, 2, 77), "fp16")
    kernel, seen = apply_map.apply_map_kernel, []

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **options):
                seen.append((grid, options["BLOCK_M"], options["BLOCK_N"]))
                return kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(apply_map, "apply_map_kernel", Spy())
    out = apply_map.apply_map(map, v)
    assert seen == [((2 * 3 * 2,), 16, 32)]
    assert_within_rule(out, apply64(map, v), apply_eager(map, v), v.dtype)


@pytest.mark.parametrize(
    "configs, field, text",
    [
        ([], "configs: expected an object", None),
        ({"other": {}}, r"configs: expected ops among .*'other'", None),
        ({"apply_map": {"a": 3}}, r"configs.apply_map\['a'\]: expected an object, got 3", None),
        ({"apply_map": {"a": {"block_k": 16}}}, r"\['a'\]: expected fields.*block_k", None),
        ({"apply_map": {"a": {"block_m": 48}}}, r"\['a'\].block_m: expected one of 16, 32", None),
        ({"apply_map": {"a": {"num_warps": True}}}, r"num_warps: .*got True", None),
        ({}, "device: expected a name, got None", "{}"),
        ({}, "not JSON", "{"),
    ],
    ids=["configs", "op", "bucket", "field", "value", "type", "device", "json"],
)  # fmt: skip
def test_a_malformed_file_is_named_with_the_field(device, configs, field, text):
    path = device(configs, text)
    with pytest.raises(launch_table.LaunchTableError, match=field) as raised:
        launch_table.measured("apply_map", CPU, apply_map.bucket(*CALL), None)
    assert str(raised.value).startswith(str(path))


# -- benchmarks/ops/tune.py ---------------------------------------------------------------------


def test_tuning_without_a_gpu_does_nothing(tune, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch_table, "FOLDER", tmp_path / "launch")
    assert tune.main(["--json", str(tmp_path / "out.json")]) == 0
    assert "torch sees no CUDA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_search_finds_the_quickest_and_leaves_small_gains(tune):
    cost = {(64, 4): 1.0, (128, 4): 0.9, (32, 4): 1.2, (128, 8): 0.7, (64, 8): 1.1, (32, 8): None}

    def seconds(configs):
        found = [cost[c["block_m"], c["num_warps"]] for c in configs]
        return [None if t is None else t / found[0] for t in found]

    axes, start = {"block_m": (32, 64, 128), "num_warps": (4, 8)}, {"block_m": 64, "num_warps": 4}
    fields, ratio = tune.search(start, axes, seconds)
    assert fields == {"block_m": 128, "num_warps": 8} and ratio == pytest.approx(0.7)
    cost.update({(128, 4): 0.99, (128, 8): 0.985})
    assert tune.search(start, axes, seconds) == ({}, None)


def test_what_was_found_is_merged_by_op(tune, tmp_path):
    path = tmp_path / "launch" / "a-gpu.json"
    about = {"torch": "2"}
    one = {"apply_map": {"a": {"fields": {"block_m": 32}, "over_heuristic": 0.9}}}
    tune.merge(path, "A GPU", about, one)
    tune.merge(path, "A GPU", about, {"attend_and_store": {}})
    assert launch_table.read(path) == {"apply_map": {"a": {"block_m": 32}}, "attend_and_store": {}}
    tune.merge(path, "A GPU", about, {"apply_map": {}})
    assert launch_table.read(path)["apply_map"] == {}


@pytest.mark.parametrize("op", list(launch_table.FIELDS))
def test_every_call_that_is_tuned_has_the_fields_of_its_op(tune, op):
    shapes = [shape for shape in tune.CROSS_ATTENTIONS if shape.s_q <= 256]
    tune.CROSS_ATTENTIONS = shapes
    calls = list(tune.cases(op, "cpu"))
    assert len(calls) >= 4
    for case in calls:
        for field, values in tune.axes_of(op).items():
            assert getattr(case.start, field) in launch_table.FIELDS[op][field]
            assert set(values) <= set(launch_table.FIELDS[op][field])
