"""What the benchmark's workloads take at least: a server that only multiplies and reads."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from headgate.bench import bounds
from headgate.bench.ideal_server import IdealRun, IdealServer, Rates, StepDemand
from headgate.bench.results import Run, Session
from headgate.bench.roofline import Roofline
from headgate.bench.workload import Case, parse_plan
from headgate.router.scheduler_config import SchedulerConfig

DEMAND = StepDemand(
    num_layers=4,
    layer_flops=1000.0,
    head_flops=400.0,
    attention_flops=1.0,
    weight_bytes=500.0,
    kv_bytes=2.0,
)
RATES = Rates(products=1e6, head=1e6, attention=1e6, memory=1e6)
PROMPT = list(range(40))


def served(
    prompts: list[tuple[list[int], int]],
    concurrency: int = 1,
    rates: Rates = RATES,
    right: float = 1.0,
    round_trip: float = 0.0,
    **limits: int,
) -> IdealRun:
    settings = {"max_batch_prefill_tokens": 64, "draft_tokens": 0, **limits}
    config = SchedulerConfig(num_blocks=100, block_size=16, **settings)
    return IdealServer(config, DEMAND, rates, right).run(prompts, concurrency, round_trip)


def test_a_prompt_and_a_token_take_their_arithmetic() -> None:
    run = served([(PROMPT, 2)])
    # 39 tokens without the last layer, one with it; 820 pairs of queries and keys.
    whole = 1 + 39 * 0.75
    first = (whole * 1000 + 400 + 820 * whole / 40) / 1e6
    then = (1000 + 400 + 41) / 1e6
    assert run.ttft_p50 == pytest.approx(first * 1e3)
    assert run.output_tokens_per_s == pytest.approx(2 / (first + then))
    assert run.steps == 2


def test_reading_takes_the_time_where_it_is_longer_and_others_take_their_share() -> None:
    slow = Rates(products=1e9, head=1e9, attention=1e9, memory=1e6)
    # Three blocks of keys and values are read in either step.
    assert served([(PROMPT, 2)], rates=slow).output_tokens_per_s == pytest.approx(1e6 / 596)
    busy = Rates(products=1e9, head=1e9, attention=1e9, memory=1e6, others=0.5)
    assert served([(PROMPT, 2)], rates=busy).output_tokens_per_s == pytest.approx(0.5e6 / 596)


def test_blocks_that_rows_share_are_read_once() -> None:
    slow = Rates(products=1e9, head=1e9, attention=1e9, memory=1e6)
    other = [*PROMPT[:-1], 7]
    alone = served([(PROMPT, 1)], rates=slow)
    both = served([(PROMPT, 1), (other, 1)], 2, rates=slow, max_batch_prefill_tokens=128)
    # Two of three blocks are common to both.
    assert alone.ttft_p50 == pytest.approx((500 + 3 * 32) / 1e6 * 1e3)
    assert both.ttft_p50 == pytest.approx((500 + 4 * 32) / 1e6 * 1e3)


def test_guesses_that_are_right_save_steps() -> None:
    limits = {"draft_tokens": 3, "max_batch_prefill_tokens": 100}
    assert served([(PROMPT, 9)], right=1.0, **limits).steps == 3
    assert served([(PROMPT, 9)], right=0.0, **limits).steps == 9
    assert 3 < served([(PROMPT, 9)], right=0.5, **limits).steps < 9


def test_each_client_asks_again_when_its_answer_has_ended() -> None:
    prompts = [([number] * 20, 5) for number in range(6)]
    alone, together = served(prompts), served(prompts, 3)
    assert together.output_tokens_per_s > alone.output_tokens_per_s
    assert alone.steps == 6 * 5 and together.steps < 6 * 5
    assert together.ttft_p50 >= alone.ttft_p50


def test_steps_do_not_wait_for_a_client_to_ask_again() -> None:
    alone = served([(PROMPT, 2), (PROMPT, 2)], round_trip=0.01)
    near = served([(PROMPT, 2), (PROMPT, 2)])
    # What the second has of the first's prompt in the cache is the same in both.
    assert 4 / alone.output_tokens_per_s == pytest.approx(4 / near.output_tokens_per_s + 0.01)
    assert alone.ttft_p50 == pytest.approx(near.ttft_p50 + 10)
    # The other client's steps go on, and the newcomer waits for the one under way.
    prompts = [([1] * 30, 3), ([2] * 30, 9), ([3] * 30, 1)]
    assert served(prompts, 2, round_trip=0.01).steps > served(prompts, 2).steps


def test_plans_are_read() -> None:
    assert parse_plan("default:1:8,shared-prefix:8:32") == [
        Case("default", 1, 8),
        Case("shared-prefix", 8, 32),
    ]
    for wrong in ("default:1", "other:1:8", "default:x:8", ""):
        with pytest.raises(ValueError, match="workload:concurrency:requests"):
            parse_plan(wrong)


def test_the_command_sets_bounds_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = asdict(Roofline(2, 100.0, 400.0, 20.0, bf16_gflops=200.0))
    result = {"output_tokens_per_s": 12.0, "ttft_p50": 345.0, "errors": 0}
    runs = [
        Run("Headgate", "int8", "default", 2, 4, 0, 1.0, {}, {}, result, [roofline]),
        Run("OpenVINO GenAI", "int8", "default", 2, 4, 0, 1.0, {}, {}, result, [roofline]),
    ]
    Session({"cores": 2}, {}, runs).save(tmp_path / "measured.jsonl")
    words = ["bounds", "--of", str(tmp_path / "measured.jsonl"), "--plan", "default:2:4"]
    monkeypatch.setattr("sys.argv", [*words, "--kinds", "int8,bf16"])
    assert bounds.main() == 0
    printed = capsys.readouterr().out
    assert "float32 100 GFLOP/s, bfloat16 pairs 200, int8 400 GOP/s, memory 20.0 GB/s" in printed
    int8, bf16 = (line.split(" | ") for line in printed.splitlines()[-2:])
    assert int8[:3] == ["| int8", "default", "2"] and bf16[0] == "| bf16"
    assert "Headgate 12, 345 ms; OpenVINO GenAI 12, 345 ms" in int8[5]
    assert "12" not in bf16[5]
    assert float(int8[3]) > 2 * float(bf16[3]) and float(int8[4]) < float(bf16[4]) / 2

    monkeypatch.setattr("sys.argv", [*words, "--kinds", "int8", "--products", "0.5"])
    assert bounds.main() == 0
    halved = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert float(halved[3]) < float(int8[3])


def test_a_machine_without_the_instruction_bounds_no_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = asdict(Roofline(2, 100.0, 0.0, 20.0))
    run = Run("Headgate", "int8", "default", 2, 4, 0, 1.0, {}, {}, {}, [roofline])
    Session({"cores": 2}, {}, [run]).save(tmp_path / "measured.jsonl")
    words = ["bounds", "--of", str(tmp_path / "measured.jsonl"), "--plan", "default:1:1"]
    monkeypatch.setattr("sys.argv", [*words, "--kinds", "int8,bf16-medium"])
    assert bounds.main() == 0
    printed = capsys.readouterr()
    assert "int8: this machine has no int8 dot product" in printed.err
    assert printed.out.splitlines()[-1].startswith("| bf16-medium | default | 1 | ")


@pytest.mark.parametrize(
    ("flag", "value", "limits"),
    [
        ("--products", "0", "above 0 and at most 1"),
        ("--memory", "1.5", "above 0 and at most 1"),
        ("--right", "2", "from 0 to 1"),
        ("--others", "1", "from 0 to below 1"),
        ("--round-trip", "-4", "0 or more"),
        ("--head", "much", "above 0 and at most 1"),
    ],
)
def test_numbers_out_of_their_limits_are_refused(
    flag: str,
    value: str,
    limits: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["bounds", f"{flag}={value}"])
    with pytest.raises(SystemExit):
        bounds.main()
    assert f"argument {flag}: {value} is not a number {limits}" in capsys.readouterr().err
