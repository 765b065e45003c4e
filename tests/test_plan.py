"""Config, presets, JSON and plans: pure data, no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import hgc
from hgc import Config, ConfigError, StepPlan
from hgc.planning.rule import check_plan, reads, scaled_key_steps

PRESETS = ("exact", "paper", "balanced", "fast", "turbo")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 10, 19, 20, 21, 50, 100, 999])
def test_presets_plan_any_number_of_evaluations(name, count):
    steps = hgc.plan(name, count)
    assert len(steps) == count
    assert steps[0].is_key
    check_plan(steps)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name, tmp_path):
    config = Config.preset(name)
    assert Config.from_json(config.to_json()) == config
    config.to_json(tmp_path / "c.json")
    assert Config.from_json(tmp_path / "c.json") == config
    assert Config.of(str(tmp_path / "c.json")) == config


def test_explicit_steps_round_trip():
    steps = tuple(hgc.plan("balanced", 20))
    config = Config(name="mine", num_evaluations=20, steps=steps)
    assert Config.from_json(config.to_json()) == config
    assert hgc.plan(config, 20) == list(steps)
    with pytest.raises(ConfigError, match="'mine' is for 20 evaluations; got num_evaluations=21"):
        hgc.plan(config, 21)


def test_exact_is_every_evaluation_in_full():
    assert hgc.plan("exact", 20) == [StepPlan()] * 20
    assert Config.preset("exact").is_exact
    assert not Config.preset("paper").is_exact


def test_first_order_coefficients():
    config = Config(num_evaluations=8, key_steps=(0, 2, 6), feature_damping=0.5)
    steps = hgc.plan(config, 8)
    assert steps[1].forecast == (1.0,)  # one key value so far
    # keys 0 and 2, one step on: slope 0.5 * 1 / 2
    assert steps[3].forecast == pytest.approx((1.25, -0.25))
    assert steps[5].forecast == pytest.approx((1.75, -0.75))
    assert steps[7].forecast == pytest.approx((1.125, -0.125))  # keys 2 and 6


@pytest.mark.parametrize(
    ("reference", "count", "expected"),
    [
        (20, 20, (0, 4, 9, 14, 19)),
        (20, 5, (0, 1, 2, 3, 4)),
        (20, 3, (0, 1, 2)),
        (20, 10, (0, 2, 4, 7, 9)),
    ],
)
def test_key_steps_of_shorter_runs(reference, count, expected):
    assert scaled_key_steps((0, 4, 9, 14, 19), reference, count) == expected


def test_key_steps_of_longer_runs_keep_their_share():
    keys = scaled_key_steps((0, 4, 9, 14, 19), 20, 60)
    assert len(keys) == 15
    assert keys[0] == 0 and keys[-1] == 59
    assert list(keys) == sorted(set(keys))


@pytest.mark.parametrize(
    ("count", "expected"),
    [(20, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)), (9, (0, 2, 5, 7)), (5, (0, 1, 3, 4))],
)
def test_what_follows_the_last_key_step_scales_too(count, expected):
    """A rule that ends with one reused evaluation does not end a longer run with three."""
    assert scaled_key_steps((0, 2, 4, 6), 8, count) == expected


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([StepPlan(depth=1)], "evaluation 0: depth=1 reads a feature nothing wrote"),
        (
            [StepPlan(control="off"), StepPlan(control="reuse")],
            "evaluation 1: control='reuse' reads residuals nothing wrote",
        ),
        ([StepPlan(attention="reuse")], "evaluation 0: attention='reuse' reads an output"),
        ([StepPlan(guidance="reuse")], "evaluation 0: guidance='reuse' reads a difference"),
        (
            [StepPlan(), StepPlan(depth=0)],
            "evaluation 1: depth=0 computes nothing, so control must be 'off'",
        ),
        ([StepPlan(encoder="reuse")], "evaluation 0: encoder='reuse' needs an integer depth"),
        (
            [StepPlan(), StepPlan(guidance="reuse"), StepPlan(control="reuse", depth=1)],
            "evaluation 2: guidance='both' reads features of which",
        ),
        ([], "at least one evaluation"),
    ],
)
def test_impossible_plans_are_refused(steps, message):
    with pytest.raises(ConfigError, match=message.replace("'", ".")):
        check_plan(steps)


def test_residuals_of_a_shallow_evaluation_may_be_read():
    check_plan(
        [
            StepPlan(control="off"),
            StepPlan(depth=1, control="compute"),
            StepPlan(depth=1, control="reuse"),
        ]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": -1}, "Config.depth must be an integer of at least 0; got -1"),
        ({"depth": True}, "Config.depth must be an integer"),
        ({"encoder": "none"}, "Config.encoder must be one of needed, reuse; got 'none'"),
        (
            {"feature_damping": float("nan")},
            "Config.feature_damping must be a finite number; got nan",
        ),
        ({"attention_gate": 1.5}, r"Config.attention_gate must lie in \[0.0, 1.0\]; got 1.5"),
        ({"key_steps": (1, 2)}, "Config.key_steps must start with 0"),
        ({"key_steps": (0, 3, 2)}, "Config.key_steps must rise without repeats"),
        ({"key_steps": (0, 20)}, "Config.key_steps must lie below num_evaluations=20; got 20"),
        ({"key_steps": (0, 5), "conditional_key_steps": (3,)}, "must be key steps; 3 is not in"),
        ({"key_steps": (0, 5), "control_key_steps": (0, 3)}, "control_key_steps must be key steps"),
        ({"key_steps": (0, 5), "control_key_steps": (5,)}, "control_key_steps must start with 0"),
        ({"num_evaluations": 0}, "Config.num_evaluations must be an integer of at least 1"),
        ({"steps": (StepPlan(),)}, "Config.steps must have num_evaluations=20 entries; got 1"),
        ({"map_format": "int8"}, "Config.map_format must be one of fp32, fp16, bf16, e4m3"),
        ({"max_cache_bytes": -1}, "Config.max_cache_bytes must be an integer of at least 0"),
    ],
)
def test_wrong_values_name_the_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"key_step": [0]}, "Config has no field 'key_step'; did you mean 'key_steps'?"),
        ({"steps": [{"dept": 1}]}, "StepPlan has no field 'dept'; did you mean 'depth'?"),
        ({"steps": [3]}, "a StepPlan must be an object of fields; got 3"),
        ({"steps": 3}, "Config.steps must be a list of objects"),
        ({"feature_damping": "x"}, "Config.feature_damping must be a finite number; got 'x'"),
        ([1], "must hold an object of fields; got list"),
    ],
)
def test_wrong_json_names_the_key(data, message):
    with pytest.raises(ConfigError) as caught:
        Config.from_json(json.dumps(data))
    assert message in str(caught.value)


def test_json_may_not_hold_nan_or_garbage():
    with pytest.raises(ConfigError, match="finite"):
        Config.from_json('{"feature_damping": NaN}')
    with pytest.raises(ConfigError, match="is not JSON"):
        Config.from_json("{")


def test_a_file_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xef\xbb\xbf" + Config.preset("fast").to_json().encode())
    assert Config.from_json(path) == Config.preset("fast")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"plan\.json is not JSON: 'utf-8'"):
        Config.from_json(path)


def test_misspelt_preset_names_them_all():
    with pytest.raises(ValueError) as caught:
        Config.preset("balancd")
    message = str(caught.value)
    assert all(name in message for name in PRESETS)
    assert "Did you mean 'balanced'?" in message


def test_controlnets_have_key_steps_of_their_own():
    rule = Config(
        num_evaluations=10, key_steps=(0, 3, 6, 9), control_key_steps=(0, 6), feature_damping=0.5
    )
    steps = hgc.plan(rule, 10)
    assert [i for i, s in enumerate(steps) if s.control == "compute"] == [0, 6]
    assert [i for i, s in enumerate(steps) if s.is_key] == [0, 3, 6, 9]
    # features are forecast from 6 and 3, residuals from 6 and 0, half of the gap's slope each
    assert steps[8].forecast == pytest.approx((1 + 0.5 * 2 / 3, -0.5 * 2 / 3), abs=1e-5)
    assert steps[8].of_residuals == pytest.approx((1 + 0.5 * 2 / 6, -0.5 * 2 / 6), abs=1e-5)
    assert steps[9].of_residuals == pytest.approx((1.25, -0.25))
    assert not rule.is_exact
    every = rule.replace(key_steps=tuple(range(10)))
    assert not every.is_exact and every.replace(control_key_steps=tuple(range(10))).is_exact
    # a longer run keeps which keys, by rank, go without
    longer = hgc.plan(rule, 20)
    keys = [i for i, s in enumerate(longer) if s.is_key]
    assert longer[keys[0]].control == "compute"
    assert any(longer[k].control == "reuse" for k in keys)
    assert Config.from_json(rule.to_json()) == rule


def test_controlnets_computed_between_keys_are_values_too():
    rule = Config(
        num_evaluations=8, key_steps=(0, 1, 6, 7), control_key_steps=(0, 1, 7), control="compute",
        feature_damping=1.0,
    )  # fmt: skip
    # evaluations 5 and 4 computed the ControlNet: one step on, one apart
    assert hgc.plan(rule, 8)[6].of_residuals == pytest.approx((2.0, -1.0))


def test_conditional_keys_carried_over_leave_both_halves_where_they_are_read():
    rule = Config(num_evaluations=7, key_steps=(0, 1, 4, 5), conditional_key_steps=(4,))
    for count in range(1, 40):
        hgc.plan(rule, count)


def test_exact_steps_beside_a_rule_are_not_exact():
    steps = (StepPlan(),) * 8
    assert Config(num_evaluations=8, steps=steps).is_exact
    assert not Config(num_evaluations=8, steps=steps, key_steps=(0, 4)).is_exact


def test_reads():
    assert reads(StepPlan(), 12) == set()
    shallow = StepPlan(control="reuse", depth=2, guidance="reuse")
    assert reads(shallow, 12) == {"feature/2", "residual/0", "residual/1", "guidance"}
    assert reads(StepPlan(control="off", depth=0), 12) == {"output"}
    assert "residual/mid" in reads(StepPlan(control="reuse"), 12)


def test_plan_needs_no_torch():
    code = (
        "import sys, hgc; hgc.plan('paper', 20); "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
