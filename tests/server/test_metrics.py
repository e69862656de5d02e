"""The metric table's identities after any run, its labels from the start, its price per step."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine, tiny_info
from http_server import MODEL, RunningServer, serve
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dspark.engine import EngineGauges, Phase, Reason, Request, StepFacts
from dspark.server.histogram import BatchHistogram
from dspark.server.metrics import Metrics


class Page:
    """A scrape, by sample name."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.samples = [sample for family in self.families for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        values = [
            sample.value
            for sample in self.samples
            if sample.name == f"dspark_{name}" and labels.items() <= sample.labels.items()
        ]
        assert values, f"{name} {labels} is not on the page"
        return sum(values)


def scrape(server: RunningServer) -> Page:
    return Page(server.http.get("/metrics").text)


def wild(request: Request, index: int) -> Iterator[tuple[int, ...]]:
    """Batches of every size, an end of text somewhere."""
    source = random.Random(f"{request.sampling.seed} {index}")
    yield (source.randrange(75, 90),)
    while True:
        yield tuple(source.choice([75, 76, 77, 78, 2]) for _ in range(source.randint(1, 8)))


@pytest.fixture(scope="module")
def after_a_wild_run(folder: Path) -> Iterator[RunningServer]:
    """Streams and not, stops, several choices, bad requests, refused ones and clients that leave; then idle."""
    with serve(folder, wild, max_queued=6, slots=4, info=tiny_info(max_draft_tokens=7)) as server:

        def client(seed: int) -> None:
            for turn in range(8):
                server.chat(
                    seed=seed * 100 + turn,
                    n=1 + turn % 3,
                    max_tokens=40,
                    stream=turn % 2 == 0,
                    stop=["ab", "c"][turn % 2],
                )
                server.completion(prompt=["a", "b"], seed=turn, max_tokens=9)
            server.chat(temperature=9)

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join()
        assert server.completion(prompt=["a"] * 7).status_code == 429
        body = {"model": MODEL, "prompt": "Hi", "stream": True, "ignore_eos": True, "max_tokens": 500}
        for _ in range(20):  # on a busy machine an answer can be complete before its client is seen to leave
            with (
                httpx.Client(base_url=server.url) as leaving,
                leaving.stream("POST", "/v1/completions", json=body) as left,
            ):
                next(left.iter_raw())
            while server.engine.gauges().requests_running or scrape(server).sum("stream_clients"):
                pass
            if scrape(server).sum("requests_total", outcome="abort"):
                break
        yield server


def test_identity_1_every_draft_is_truncated_or_verified_and_then_accepted_or_rejected(
    after_a_wild_run: RunningServer,
) -> None:
    page = scrape(after_a_wild_run)
    drafted, verified = page.sum("spec_drafted_tokens_total"), page.sum("spec_verified_tokens_total")
    assert drafted == page.sum("spec_truncated_tokens_total") + verified > 0
    assert verified == page.sum("spec_accepted_tokens_total") + page.sum("spec_rejected_tokens_total")


def test_identity_2_every_generated_token_is_accepted_bonus_or_first(after_a_wild_run: RunningServer) -> None:
    page = scrape(after_a_wild_run)
    assert page.sum("generated_tokens_total") == (
        page.sum("spec_accepted_tokens_total") + page.sum("spec_bonus_tokens_total") + page.sum("first_tokens_total")
    )


def test_identity_3_lengths_and_positions_sum_to_the_totals(after_a_wild_run: RunningServer) -> None:
    page = scrape(after_a_wild_run)
    assert page.sum("spec_accepted_length_tokens_sum") == (
        page.sum("spec_accepted_tokens_total") + page.sum("spec_bonus_tokens_total")
    )
    assert page.sum("spec_accepted_length_tokens_count") == page.sum("spec_rounds_total")
    for stage in ("drafted", "verified", "accepted"):
        assert page.sum(f"spec_position_{stage}_tokens_total") == page.sum(f"spec_{stage}_tokens_total")


def test_identity_4_blocks_sum_to_the_pool_and_nothing_is_left_when_idle(after_a_wild_run: RunningServer) -> None:
    page = scrape(after_a_wild_run)
    assert page.sum("kv_cache_blocks") == after_a_wild_run.engine.info.num_blocks
    assert page.sum("kv_cache_blocks", state="used") == 0
    for gauge in ("requests_running", "requests_waiting", "stream_clients"):
        assert page.sum(gauge) == 0


def test_identity_5_every_request_is_admitted_or_shed_and_ends_once(after_a_wild_run: RunningServer) -> None:
    page = scrape(after_a_wild_run)
    assert page.sum("requests_total") == page.sum("requests_admitted_total") + page.sum("requests_shed_total")
    assert page.sum("requests_total", outcome="shed") == page.sum("requests_shed_total") > 0
    assert page.sum("requests_total", outcome="abort") == page.sum("requests_cancelled_total") > 0
    assert page.sum("request_errors_total", type="overloaded") == page.sum("requests_shed_total")
    assert page.sum("http_requests_total", code="429") == page.sum("requests_shed_total")
    assert page.sum("request_duration_seconds_count") == page.sum("requests_admitted_total")
    assert page.sum("request_errors_total", type="invalid_request") == 6


def test_http_answers_are_counted_as_clients_saw_them(folder: Path) -> None:
    with serve(folder, wild) as server:
        answers = [
            server.chat(),
            server.chat(n=0),
            server.chat(model="x"),
            server.http.get("/a/b"),
            server.http.put("/c"),
        ]
        page = scrape(server)
        for code in ("200", "400", "404"):
            assert page.sum("http_requests_total", code=code) == [str(a.status_code) for a in answers].count(code)
        assert page.sum("http_requests_total", route="other") == 2


def test_nothing_a_client_says_becomes_a_label(folder: Path) -> None:
    with serve(folder, wild) as server:
        server.http.request("BREW", "/coffee/please")
        server.chat(model="coffee")
        text = server.http.get("/metrics").text
    assert "coffee" not in text
    assert "BREW" not in text


def test_before_any_request_every_fixed_label_is_there_with_0() -> None:
    page = Page(Metrics(MODEL, tiny_info()).page(_idle()).decode())
    for reason in Reason:
        assert page.sum("spec_truncated_tokens_total", reason=reason) == 0
    for outcome in ("stop", "length", "abort", "error", "shed"):
        assert page.sum("requests_total", outcome=outcome, endpoint="chat_completions") == 0
    assert page.sum("http_requests_total", route="/v1/chat/completions", code="200") == 0
    assert page.sum("spec_accepted_length_tokens_count") == 0
    assert page.sum("controller_cost_model_seconds", tokens="257-512") == 0.2
    for result in ("new", "replay", "join", "conflict", "expired", "store_error"):
        assert page.sum("idempotency_requests_total", result=result) == 0
    for cause in ("client_disconnect", "deadline", "shutdown"):
        assert page.sum("requests_cancelled_total", cause=cause) == 0
    assert page.sum("cancel_seconds_count") == page.sum("engine_stalls_total") == 0


def test_what_was_not_measured_yet_is_not_a_number_rather_than_a_good_one() -> None:
    page = Page(Metrics(MODEL, tiny_info()).page(_idle()).decode())
    assert math.isnan(page.sum("spec_speedup_ratio"))
    assert math.isnan(page.sum("spec_calibration_error_ratio"))


def test_speedup_and_calibration_error_are_of_the_steps_taken_in() -> None:
    metrics = Metrics(MODEL, tiny_info())
    confident = StepFacts(phase=Phase.VERIFY, step_s=0.01, plain_estimate_s=0.02, verified=1000, accepted=500)
    confident.confidence_count[9], confident.confidence_accepted[9], confident.confidence_sum[9] = 1000, 500, 950.0
    metrics.steps.step(confident)
    metrics.steps.step(StepFacts(phase=Phase.PREFILL, step_s=9.0))
    page = Page(metrics.page(_idle()).decode())
    assert page.sum("spec_speedup_ratio") == 2.0
    assert page.sum("decode_plain_estimate_seconds_total") / page.sum("decode_seconds_total") == 2.0
    assert page.sum("spec_calibration_error_ratio") == pytest.approx(0.45, abs=0.01)


def test_what_the_engine_counts_itself_is_told_once() -> None:
    metrics = Metrics(MODEL, tiny_info())
    for stalls, failed_steps in ((1, 0), (1, 0), (3, 2)):
        page = metrics.page(replace(_idle(), stalls_total=stalls, failed_steps_total=failed_steps))
    assert Page(page.decode()).sum("engine_stalls_total") == 3
    assert Page(page.decode()).sum("engine_failed_steps_total") == 2


def test_the_end_of_the_last_step_is_the_engines_own_clock_reading() -> None:
    page = Metrics(MODEL, tiny_info()).page(replace(_idle(), last_step_unix_s=1.75e9 + 0.25))
    assert Page(page.decode()).sum("engine_last_step_timestamp_seconds") == 1.75e9 + 0.25


def test_the_cost_of_the_server_is_what_the_operator_said_in_that_currency() -> None:
    unset = Page(Metrics(MODEL, tiny_info()).page(_idle()).decode())
    assert unset.sum("instance_cost_per_hour", currency="USD") == 0
    page = Page(Metrics(MODEL, tiny_info(), hourly_cost=0.35, currency="EUR").page(_idle()).decode())
    assert page.sum("instance_cost_per_hour") == page.sum("instance_cost_per_hour", currency="EUR") == 0.35


def test_memory_is_that_of_this_process() -> None:
    page = Page(Metrics(MODEL, tiny_info(kv_cache_bytes=4096)).page(_idle()).decode())
    assert page.sum("device_memory_bytes", device="cpu", kind="kv_cache") == 4096
    allocated = page.sum("device_memory_bytes", device="cpu", kind="allocated")
    assert 10 * 2**20 < allocated < page.sum("device_memory_bytes", device="cpu", kind="total")


def test_the_page_is_small_prefixed_and_has_no_created_series(after_a_wild_run: RunningServer) -> None:
    page = scrape(after_a_wild_run)
    assert len(page.samples) <= 1500
    assert all(sample.name.startswith("dspark_") for sample in page.samples)
    assert not any(sample.name.endswith("_created") for sample in page.samples)


def test_drafts_longer_than_the_last_position_are_counted_with_it() -> None:
    metrics = Metrics(MODEL, tiny_info(max_draft_tokens=20))
    metrics.steps.step(StepFacts(verified=20, verified_at=[1] * 20))
    page = Page(metrics.page(_idle()).decode())
    assert page.sum("spec_position_verified_tokens_total", position="15+") == 5
    assert page.sum("spec_position_verified_tokens_total") == 20


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5)), max_size=20))
def test_a_value_counted_many_times_equals_many_observations(observations: list[tuple[float, int]]) -> None:
    bounds = [0.5, 1, 10]
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    batch = BatchHistogram("h", "h", bounds, ["model"], [("m",)], ours).children[("m",)]
    disable_created_metrics()
    single = Histogram("h", "h", ["model"], registry=theirs, buckets=bounds).labels("m")
    for value, times in observations:
        batch.observe(value, times)
        for _ in range(times):
            single.observe(value)
    ours_page, theirs_page = (
        {
            (s.name, s.labels.get("le")): s.value
            for f in text_string_to_metric_families(page.decode())
            for s in f.samples
        }
        for page in (generate_latest(ours), generate_latest(theirs))
    )
    assert ours_page == pytest.approx(theirs_page)


def _idle() -> EngineGauges:
    return FakeEngine(wild).gauges()
