"""From prompts to a drafter that the server runs, on a tiny target."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_model

from dspark.engine import ConfigError, Engine, EngineConfig, Request, SamplingParams
from dspark.engine.drafters.draft_checkpoint import read_draft_spec
from dspark.engine.drafters.eagle3_checkpoint import read_eagle3_spec
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.startup import choose_dtype
from dspark.server import cli
from dspark.training import answers, evaluate, train_drafter
from dspark.training.acceptance import accepted_length
from dspark.training.answers import Prompt, read_shards
from dspark.training.held_out import HeldOut
from dspark.training.loss_report import LossReport

METHODS = ("dspark", "dflash", "eagle3")
TRAINED_ON, STEPS, ANSWER_TOKENS, HEAD_IDS = 40, 80, 24, 200
PROMPTS = [f"Count from {i} on." for i in range(120)]
HELD_OUT = sum(Prompt("count", text).held_out for text in PROMPTS)
MORE_OPTIONS = (
    f"--answer-tokens {ANSWER_TOKENS} --slots 16 --layers 1 --captured-layers 0,1,2 --block-size 4 --markov-rank 8 "
    f"--head-ids {HEAD_IDS} --mask-token-id 1 --shared-head --learning-rate 2e-3"
).split()


class KilledError(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def _small_shards_and_a_cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "SHARD_PROMPTS", 16)
        patch.setenv("DSPARK_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("target"), num_hidden_layers=4, head_dim=32)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "count.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "kind": "count"}) + "\n" for text in PROMPTS))
    return path


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(target: Path, prompts: Path) -> Train:
    """Runs the command: (out, *further options)."""

    def run(out: Path, *options: str, prompts: Path = prompts) -> Path:
        parser = argparse.ArgumentParser()
        train_drafter.add_arguments(parser)
        files = ["--target", str(target), "--prompts", str(prompts), "--out", str(out)]
        sizes = ["--steps", str(STEPS), "--max-prompts", str(TRAINED_ON)]
        assert train_drafter.main(parser.parse_args([*files, *sizes, *MORE_OPTIONS, *options])) == 0
        return out

    return run


@pytest.fixture(scope="module")
def trained(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each method; the target answers for the first one only."""
    folder = tmp_path_factory.mktemp("trained")
    first = train(folder / METHODS[0], "--method", METHODS[0])
    for method in METHODS[1:]:
        take_stages(first, folder / method)
        train(folder / method, "--method", method)
    return {method: folder / method for method in METHODS}


@pytest.fixture(scope="module")
def untrained(train: Train, trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The drafters from which training began."""
    folder = tmp_path_factory.mktemp("untrained")
    for method in METHODS:
        take_stages(trained[METHODS[0]], folder / method)
        train(folder / method, "--method", method, "--steps", "1", "--learning-rate", "0", "--until", "training")
    return {method: folder / method for method in METHODS}


def take_stages(source: Path, out: Path) -> None:
    """All that the methods have in common."""
    shutil.copytree(source / "work", out / "work", ignore=shutil.ignore_patterns("state.*", "loss.*"))


def loss_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "work" / "loss.jsonl").read_text().splitlines()]


@torch.no_grad()
def replayed_length(target: Path, drafter: Path) -> float:
    """τ of the drafter alone on the answers that it was trained on."""
    spec = read_spec(target)
    decoder = Decoder(spec, load_weights(target, spec, choose_dtype(EngineConfig())), 400, LinearFactory())
    recorded = [one for shard in read_shards(drafter / "work" / "answers") for one in shard]
    config = EngineConfig(drafter=str(drafter), lookup=False, max_num_seqs=16)
    evaluation = evaluate.evaluate(
        config, drafter.name, decoder=decoder, target_name="", answers=recorded, max_tokens=ANSWER_TOKENS
    )
    return accepted_length(evaluation.rounds)


def served(target: Path, drafter: str, requests: Sequence[Request]) -> tuple[list[list[int]], int]:
    """The answers, by full blocks of the drafter alone or without speculation for `lookup`, and the accepted drafts."""

    async def run() -> tuple[list[list[int]], int]:
        speculation = "off" if drafter == "lookup" else "fixed"
        lookup = None if drafter == "lookup" else False
        config = EngineConfig(
            model=str(target), drafter=drafter, lookup=lookup, speculation=speculation, kv_cache_bytes=1 << 22,
            max_num_seqs=8, max_num_batched_tokens=64,
        )  # fmt: skip
        engine = await asyncio.to_thread(Engine.load, config)
        await engine.start()

        async def answer(request: Request) -> tuple[list[int], int]:
            tokens: list[int] = []
            async with engine.submit(request) as stream:
                async for delta in stream:
                    tokens += delta.token_ids
            return tokens, stream.facts.accepted_tokens

        found = await asyncio.gather(*map(answer, requests))
        await engine.close()
        return [tokens for tokens, _ in found], sum(accepted for _, accepted in found)

    return asyncio.run(run())


@pytest.fixture(scope="module")
def requests(trained: dict[str, Path]) -> list[Request]:
    """Some prompts that the drafters were trained on, in other samples and longer."""
    first = read_shards(trained["dspark"] / "work" / "answers")[0][:8]
    return [
        Request(
            tuple(one.tokens[: one.prompt_len].tolist()),
            SamplingParams(temperature=float(place % 2), seed=1000 + place, max_tokens=40, ignore_eos=True),
        )
        for place, one in enumerate(first)
    ]


@pytest.fixture(scope="module")
def plain(target: Path, requests: list[Request]) -> list[list[int]]:
    return served(target, "lookup", requests)[0]


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_raises_the_accepted_length(
    method: str, trained: dict[str, Path], untrained: dict[str, Path], target: Path
) -> None:
    losses = [line["loss"] for line in loss_lines(trained[method])]
    assert len(losses) == STEPS / 20
    assert losses[-1] < 0.9 * losses[0]
    before, after = (replayed_length(target, drafters[method]) for drafters in (untrained, trained))
    assert after > before + 0.1


@pytest.mark.parametrize("method", METHODS)
def test_the_server_drafts_with_it_and_answers_the_same(
    method: str, trained: dict[str, Path], target: Path, requests: list[Request], plain: list[list[int]]
) -> None:
    drafted, accepted = served(target, str(trained[method]), requests)
    assert accepted > 0
    assert drafted == plain


def test_dspark_and_dflash_draft_the_ids_that_the_answers_use_most(trained: dict[str, Path], target: Path) -> None:
    recorded = [one for shard in read_shards(trained["dspark"] / "work" / "answers") for one in shard]
    tokens = [token for one in recorded for token in one.tokens[one.prompt_len :].tolist()]
    for method in ("dspark", "dflash"):
        ids = read_draft_spec(trained[method]).draft_token_ids
        assert ids is not None
        assert len(ids) == HEAD_IDS
        left_out = set(range(read_spec(target).vocab_size)) - set(ids)
        assert max(map(tokens.count, left_out)) <= min(map(tokens.count, ids))


def test_each_method_gives_a_checkpoint_of_its_own_kind(trained: dict[str, Path]) -> None:
    dspark, dflash = read_draft_spec(trained["dspark"]), read_draft_spec(trained["dflash"])
    assert (dspark.markov, dspark.markov_rank, dspark.confidence_head) == ("vanilla", 8, True)
    assert (dflash.markov, dflash.markov_rank, dflash.confidence_head) == (None, 0, False)
    eagle3 = read_eagle3_spec(trained["eagle3"])
    assert dspark.block_size == dflash.block_size == eagle3.ttt_length == 4
    assert dspark.target_layer_ids == dflash.target_layer_ids == eagle3.target_layer_ids == (0, 1, 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_report_measures_the_second_half_of_the_held_out_prompts_alone_and_with_lookup(
    method: str, trained: dict[str, Path]
) -> None:
    folder = trained[method] / "report"
    report = (folder / "report.md").read_text(encoding="utf-8")
    for name in (method, f"{method}-alone"):
        for temperature in ("T = 0", "T = 1"):
            assert f"| {name} | {temperature} | all | {HELD_OUT - HELD_OUT // 2} |" in report
    for picture in ("loss.png", "positions.png", f"reliability-{method}.png", f"threshold-{method}-alone.png"):
        assert f"({picture})" in report
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_only_a_confidence_head_comes_with_temperatures_for_greedy_and_sampled(trained: dict[str, Path]) -> None:
    greedy, sampled = read_draft_spec(trained["dspark"]).temperatures
    assert len(greedy) == len(sampled) == 4
    assert greedy != sampled
    assert read_draft_spec(trained["dflash"]).temperatures == ()
    assert "fitted on" in (trained["dspark"] / "report" / "report.md").read_text(encoding="utf-8")


def results(out: Path) -> dict[Path, int]:
    """When each result of a stage that is finished once written was written."""
    return {path: path.stat().st_mtime_ns for path in (out / "work").glob("*/**/*.*") if path.suffix != ".partial"}


def kill_in(stage: str, patch: pytest.MonkeyPatch) -> None:
    """Let the next run stop in the middle of the stage."""

    def killing_bar(name: str) -> Callable[[int, int], None]:
        def show(done: int, total: int) -> None:
            if name == stage and done < total:
                raise KilledError

        return show

    def killed_report(self: LossReport, step: int, facts: dict[str, float]) -> None:
        report(self, step, facts)
        if step == 39:  # the line of 40 steps is written, their state is not
            raise KilledError

    def killed(*_: object) -> None:
        raise KilledError

    report = LossReport.__call__
    if stage == "training":
        patch.setattr(LossReport, "__call__", killed_report)
    elif stage == "report":
        patch.setattr(HeldOut, "report", killed)
    else:
        patch.setattr({"answers": answers, "features": train_drafter}[stage], "progress_bar", killing_bar)


def test_a_run_that_is_killed_in_every_stage_goes_on_and_gives_the_same_checkpoint(
    train: Train, trained: dict[str, Path], tmp_path: Path
) -> None:
    kept: dict[Path, int] = {}
    for stage in train_drafter.STAGES:
        with pytest.MonkeyPatch.context() as patch:
            kill_in(stage, patch)
            with pytest.raises(KilledError):
                train(tmp_path, "--save-every", "0")
        found = results(tmp_path)
        assert kept.items() <= found.items(), f"the run killed in {stage} made again what was there"
        assert len(found) > len(kept) or stage == "training"
        kept = found
    train(tmp_path)
    assert results(tmp_path) == kept
    for name in ("model.safetensors", "dspark.json", "config.json"):
        assert (tmp_path / name).read_bytes() == (trained["dspark"] / name).read_bytes()
    assert [line["step"] for line in loss_lines(tmp_path)] == [20, 40, 60, 80]


def test_a_stage_can_be_the_last_one(train: Train, tmp_path: Path) -> None:
    out = train(tmp_path / "answers", "--until", "answers")
    assert sorted(path.name for path in (out / "work").iterdir()) == ["answers", "run.json"]
    assert len(read_shards(out / "work" / "answers")) == 3
    train(out, "--until", "features")
    assert sorted(path.name for path in (out / "work").iterdir()) == ["answers", "features-0-1-2", "run.json"]
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning-rate", "0.5"], "learning_rate 0.002 there and 0.5 here"),
        (["--method", "dflash"], "markov 'vanilla' there and None here"),
        (["--answer-tokens", "16"], "'answer_tokens': 16"),
        (["--max-prompts", "39"], "holds the answers to other prompts"),
    ],
)
def test_the_work_of_a_run_with_other_settings_is_refused(
    options: list[str], said: str, train: Train, trained: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(trained["dspark"], tmp_path, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=said) as refused:
        train(tmp_path, *options)
    assert refused.value.field == "out"


def test_features_of_other_answers_are_refused(train: Train, trained: dict[str, Path], tmp_path: Path) -> None:
    take_stages(trained["dspark"], tmp_path)
    [*_, last] = sorted((tmp_path / "work" / "features-0-1-2").iterdir())
    last.write_bytes(last.read_bytes()[:-2])
    with pytest.raises(ConfigError, match="belongs to other answers"):
        train(tmp_path, "--until", "features")


def test_without_held_out_prompts_it_says_so_and_gives_the_checkpoint_alone(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.txt"
    few.write_text("\n".join([text for text in PROMPTS if not Prompt("few", text).held_out][:6]))
    out = train(tmp_path / "out", "--steps", "2", prompts=few)
    assert "too few of the prompts are held out" in capsys.readouterr().err
    assert read_draft_spec(out).temperatures == ()
    assert [path.name for path in (out / "report").iterdir()] == ["loss.png"]


def test_asked_for_no_held_out_prompts_it_measures_nothing(
    train: Train, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take_stages(trained["dspark"], tmp_path)
    train(tmp_path, "--steps", "2", "--held-out", "0")
    assert "held out" not in capsys.readouterr().err
    assert not (tmp_path / "report" / "report.md").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--captured-layers", "0,3"], "captured_layers: [0, 3]: the target and method offer -1 to 2"),
        (
            ["--captured-layers=-1,2", "--method", "eagle3"],
            "captured_layers: [-1, 2]: the target and method offer 0 to 2",
        ),
        (["--layers", "5"], "layers: 5, but the target has only 4"),
        (["--markov-rank", "65"], "markov_rank: 65 exceeds the target's hidden size 64"),
        (["--mask-token-id", "320"], "mask_token_id: 320, but the target has 320 ids"),
        (["--prompts", "nowhere.jsonl"], "prompts: nowhere.jsonl cannot be read"),
        (["--captured-layers", "2,1"], "should be strictly increasing, but is '2,1'"),
        (["--held-out", "-1"], "should be a whole number of at least 0, but is '-1'"),
    ],
)
def test_the_command_refuses_what_cannot_work_in_one_line(
    options: list[str], said: str, target: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--target", str(target), "--prompts", str(prompts), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as refused:
        cli.main(["train-drafter", *files, *options])
    assert refused.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("dspark train-drafter: ")
    assert said in line


def test_a_gpu_that_is_not_there_is_refused(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device: cuda is asked for"):
        train(tmp_path, "--device", "cuda")
    assert train_drafter.training_device("auto") == torch.device("cpu")
