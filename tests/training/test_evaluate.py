"""`dspark eval` from the command line, on a tiny target: what it writes and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from draft_checkpoints import TARGET_CONFIG, draft_config, random_tensors, write_draft_checkpoint
from tiny_models import write_tiny_model

from dspark.engine.models.spec import read_spec
from dspark.server.cli import main
from dspark.training.answers import Prompt, read_shards
from dspark.training.evaluate import drafter_labels
from dspark.training.plots import loss_curve

PNG = b"\x89PNG\r\n\x1a\n"
DRAFTERS = ("drafter", "drafter-alone", "lookup")
PROMPTS = [{"prompt": f"Count from {i} on.", "kind": ("count", "number")[i % 2]} for i in range(150)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a `target`, a `drafter` for it and `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("inputs")
    spec = read_spec(write_tiny_model(folder / "target", head_dim=32))
    sizes = {"vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size, "num_hidden_layers": spec.num_layers}
    config = draft_config(TARGET_CONFIG | sizes, block_size=4, num_layers=1, target_layer_ids=(-1, 0))
    (folder / "drafter").mkdir()
    tensors = random_tensors(config)
    tensors["confidence_head.proj.bias"] -= 2  # so that lookup proposes too
    write_draft_checkpoint(folder / "drafter", config, tensors)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSPARK_CACHE_DIR", str(folder / "cache"))
        yield folder


def evaluate(inputs: Path, out: Path, *options: str, drafters: tuple[str, ...] = ("lookup",)) -> int:
    names = [str(inputs / one) if one == "drafter" else one for one in drafters]
    sizes = ["--max-tokens", "16", "--slots", "16"]
    return main(["eval", "--target", str(inputs / "target"), "--out", str(out), *sizes, "--drafter", *names, *options])


def prompts(inputs: Path) -> list[str]:
    return ["--prompts", str(inputs / "prompts.jsonl"), "--split", "all", "--limit", "24"]


@pytest.fixture(scope="module")
def evaluated(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    assert evaluate(inputs, out, *prompts(inputs), "--alone", drafters=("drafter", "lookup")) == 0
    return out


def acceptance_rows(report: Path) -> dict[tuple[str, str, str], list[str]]:
    """The cells after drafter, temperature and domain in the first table."""
    section = report.read_text(encoding="utf-8").split("## Accepted length")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {(row[0], row[1], row[2]): row[3:] for row in rows[2:]}


def test_the_report_has_a_row_for_every_drafter_temperature_and_domain(evaluated: Path) -> None:
    assert set(acceptance_rows(evaluated / "report.md")) == {
        (drafter, temperature, domain)
        for drafter in DRAFTERS
        for temperature in ("T = 0", "T = 1")
        for domain in ("all", "count", "number")
    }


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_numbers_of_a_row_are_those_of_its_rounds(drafter: str, evaluated: Path) -> None:
    with np.load(evaluated / f"rounds-{drafter}.npz") as rounds:
        tokens = np.minimum(rounds["accepted"] + 1, rounds["left"])
        judged = np.minimum(rounds["verified"], rounds["left"])
        for (name, temperature, domain), cells in acceptance_rows(evaluated / "report.md").items():
            if name == drafter:
                own = rounds["temperature"] == float(temperature.removeprefix("T = "))
                own &= (rounds["kind"] == domain) | (domain == "all")
                answers, count, length, drafted, slots = cells
                assert int(answers) == len(set(rounds["answer"][own].tolist()))
                assert int(count) == own.sum()
                mean, low, high = map(float, re.findall(r"[\d.]+", length))
                assert mean == pytest.approx(tokens[own].mean(), abs=0.005)
                assert low <= mean <= high
                assert float(drafted.removesuffix(" %")) == pytest.approx(
                    100 * (rounds["proposed"][own] > 0).mean(), abs=0.5
                )
                for slot, rate in enumerate(slots.split()):
                    reached = (judged[own] > slot) & (rounds["accepted"][own] >= slot)
                    if reached.any():
                        assert float(rate) == pytest.approx((rounds["accepted"][own][reached] > slot).mean(), abs=0.005)
                    else:
                        assert rate == "–"


def test_every_round_comes_from_the_answers_that_lie_beside_the_report(evaluated: Path) -> None:
    answers = [
        one
        for temperature in ("0", "1")
        for shard in read_shards(evaluated / f"answers-t{temperature}")
        for one in shard
    ]
    assert len(answers) == 2 * 24
    with np.load(evaluated / "rounds-lookup.npz") as rounds:
        tokens = np.minimum(rounds["accepted"] + 1, rounds["left"]).sum()
    assert tokens == sum(len(one.tokens) - one.prompt_len - 1 for one in answers)


def test_every_plot_that_the_report_shows_is_a_picture(evaluated: Path) -> None:
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (evaluated / "report.md").read_text(encoding="utf-8"))
    assert len(shown) == 1 + 2 * len(DRAFTERS)
    for name in shown:
        data = (evaluated / name).read_bytes()
        assert data.startswith(PNG)
        assert len(data) > 10_000


def test_a_second_run_takes_the_answers_that_are_there(inputs: Path, evaluated: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(evaluated, again)
    made = {shard: shard.stat().st_mtime_ns for shard in again.glob("answers-*/*")}
    assert evaluate(inputs, again, *prompts(inputs)) == 0
    assert {shard: shard.stat().st_mtime_ns for shard in again.glob("answers-*/*")} == made
    known = acceptance_rows(evaluated / "report.md")
    assert acceptance_rows(again / "report.md") == {key: row for key, row in known.items() if key[0] == "lookup"}


def test_recorded_answers_give_the_same_rows_as_the_prompts(inputs: Path, evaluated: Path, tmp_path: Path) -> None:
    folders = [str(evaluated / f"answers-t{temperature}") for temperature in (0, 1)]
    assert evaluate(inputs, tmp_path, "--answers", *folders) == 0
    known = acceptance_rows(evaluated / "report.md")
    assert acceptance_rows(tmp_path / "report.md") == {key: row for key, row in known.items() if key[0] == "lookup"}


def test_temperatures_and_limit_choose_among_recorded_answers(inputs: Path, evaluated: Path, tmp_path: Path) -> None:
    folders = [str(evaluated / f"answers-t{temperature}") for temperature in (0, 1)]
    assert evaluate(inputs, tmp_path, "--answers", *folders, "--temperatures", "1", "--limit", "7") == 0
    rows = acceptance_rows(tmp_path / "report.md")
    assert {temperature for _, temperature, _ in rows} == {"T = 1"}
    assert rows["lookup", "T = 1", "all"][0] == "7"


def test_only_held_out_prompts_are_answered_unless_all_are_asked_for(inputs: Path, tmp_path: Path) -> None:
    held_out = [one for one in PROMPTS if Prompt(one["kind"], one["prompt"]).held_out]
    assert 0 < len(held_out) < len(PROMPTS)
    assert evaluate(inputs, tmp_path, "--prompts", str(inputs / "prompts.jsonl"), "--temperatures", "0") == 0
    [shard] = read_shards(tmp_path / "answers-t0")
    assert sorted(one.kind for one in shard) == sorted(one["kind"] for one in held_out)


def test_answers_to_other_prompts_in_the_folder_are_refused(
    inputs: Path, evaluated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        evaluate(inputs, evaluated, *prompts(inputs), "--limit", "23")
    assert refused.value.code == 2
    assert "holds the answers to other prompts; give another folder or remove it" in capsys.readouterr().err


def test_a_limit_that_the_answers_were_not_recorded_with_is_refused(
    inputs: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        evaluate(inputs, tmp_path, "--answers", str(evaluated / "answers-t0"), "--max-tokens", "15")
    assert refused.value.code == 2
    assert "dspark eval: max_tokens: an answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--temperatures", "0,hot", "should be numbers separated by commas, but is '0,hot'"),
        ("--temperatures", "0,3", "should each be 0..2, but is '0,3'"),
        ("--limit", "0", "should be a whole number of at least 1, but is '0'"),
    ],
)
def test_a_senseless_option_is_refused(
    option: str, value: str, message: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate(inputs, tmp_path, "--answers", str(tmp_path), option, value)
    assert message in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install_before_it_works(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        evaluate(inputs, tmp_path / "out", *prompts(inputs))
    assert "install the extra `train`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_drafters_of_one_name_keep_their_whole_path_as_label() -> None:
    assert drafter_labels(["auto", "runs/one/", "/a/new", "/b/new"]) == ["auto", "one", "a-new", "b-new"]


def test_a_drafter_with_lookup_beside_it_shows_who_proposed(evaluated: Path) -> None:
    report = (evaluated / "report.md").read_text(encoding="utf-8")
    with np.load(evaluated / "rounds-drafter.npz") as rounds:
        for temperature in (0, 1):
            own = rounds["temperature"] == temperature
            for place, source in enumerate(("dspark", "lookup")):
                proposed = own & (rounds["source"] == place) & (rounds["proposed"] > 0)
                share = f"{100 * proposed.sum() / own.sum():.0f} %"
                assert proposed.any()
                assert f"| drafter | T = {temperature} | {source} | {share} |" in report
    assert "| drafter-alone | T = 0 | dspark |" not in report


def test_a_loss_curve_is_drawn_from_the_trainers_lines(tmp_path: Path) -> None:
    lines = [{"step": i, "s": 0.1 * i, "loss": 5 / (i + 1), "ce": 1.0, "accept_1": 0.1 * i} for i in range(10)]
    (tmp_path / "loss.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss_curve(tmp_path / "loss.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)
