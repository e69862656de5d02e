"""A server in trouble: ten times what it can do, clients that leave or read slowly, steps that fail.

    python -m dspark.benchmarks.chaos [--seconds 120] [--overload 10] [--failure-every 30] [--json OUT] [serve's flags]

First the mix's capacity: so many clients in a closed loop that the batch is always full. Then the same mix arrives at
`--overload` times the rate at which requests ended at capacity, for `--seconds`, and now steps fail, too: every third time
because of one request, which must be found and ended, else by chance, which must cost nobody an answer. Goodput
is tokens/s of answers that were completed and read to their end; both loads count it from the same moment on, when a quarter
of `--seconds` has passed. Exit status 1 when a claim fails.

This process is what `dspark serve` runs, with a runner around its runner; the clients are a process of their own. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from prometheus_client.parser import text_string_to_metric_families

from dspark.benchmarks.chaos_clients import ClientsRun, Kind, Load, Mix, Outcome, Visit, run_clients
from dspark.benchmarks.claims import Claim, print_claims
from dspark.benchmarks.load import align, positive
from dspark.benchmarks.machine import describe_machine
from dspark.server.cli import add_serve_arguments, listen, load_service, run, set_threading_environment

if TYPE_CHECKING:
    from dspark.engine.calibration import CalibrationTable
    from dspark.engine.load_controller import Allocation
    from dspark.engine.runner import Pending, Runner
    from dspark.engine.sequence import Batch, RequestRecord, StepResult
    from dspark.server.service import Service

WARMUP_SHARE = 0.25
"""Of `--seconds`: answers read before are not counted. The first slow readers need so long for theirs."""
CAPACITY_SHARE = 0.75
"""Of `--seconds`: how long capacity is measured, warm-up included."""
CLIENTS_PER_SLOT = 2
"""At capacity. Slow readers hold a client for longer than a slot, so one for each slot would leave some empty."""
IDLE_TIMEOUT_S = 60.0
LEAST_GOODPUT = 0.9
MOST_REFUSAL_S = 0.1
MOST_RSS_GROWTH = 0.1

Sums = dict[str, float]
"""Sample name without prefix, alone and with each of its label values as `name{value}` → sum."""


class FaultyRunner:
    """The real runner with three faults that take turns when one is due: a step fails before its work; one after it, so that
    it is lost; and a request, the last one in the batch, breaks every step that it is in.
    """

    def __init__(self, runner: Runner) -> None:
        self.due = 0
        self.failed = 0
        """Steps."""
        self.broken: list[RequestRecord] = []
        """The requests that break steps."""
        self._begun = 0
        self._runner = runner

    def launch(self, batch: Batch, allocation: Allocation, calibration: CalibrationTable) -> Pending:
        fault = None
        if self._begun < self.due:
            fault = self._begun % 3
            self._begun += 1
            if fault == 2:
                self.broken.append(batch.sequences[-1].record)
        if fault is None and not any(sequence.record in self.broken for sequence in batch.sequences):
            return self._runner.launch(batch, allocation, calibration)
        self.failed += 1
        if fault == 1:
            self._runner.launch(batch, allocation, calibration)
        raise ArithmeticError("the chaos run lets this step fail")

    def collect(self, pending: Pending) -> StepResult:
        return self._runner.collect(pending)


@dataclass(frozen=True, slots=True)
class Census:
    """What this process holds while it is idle. threads: without those of asyncio's pool, which has a bound of its own.
    rss_bytes: without the K/V blocks that were filled, which the system hands out when they are first written.
    """

    tasks: int
    threads: int
    open_files: int
    rss_bytes: int


@dataclass(slots=True)
class Chaos:
    """What was measured. overload_sums: the metrics' growth during the overload. idle_sums: their state after it.
    failed_steps: that were let fail under the overload. broken: requests that failed every step that they were in.
    """

    capacity: ClientsRun
    requests_per_s: float
    overload: ClientsRun
    overload_sums: Sums
    idle_sums: Sums
    before: Census
    after: Census
    pool_fault: str | None
    num_blocks: int
    failed_steps: int
    broken: int
    exit_status: int = field(default=-1)


class Driver:
    """Runs the two loads against the server, from a thread of its process, and ends the server."""

    def __init__(self, service: Service, port: int, args: argparse.Namespace) -> None:
        self._service = service
        self._mix = Mix(service.settings.served_model_name, port, args.max_tokens)
        self._url = f"http://127.0.0.1:{port}"
        self._args = args
        engine_loop = service.engine._loop
        self._faults = FaultyRunner(engine_loop.runner)
        engine_loop.runner = self._faults  # type: ignore[assignment]

    def drive(self) -> Chaos:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as clients:
                return self._drive(clients)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def _drive(self, clients: ProcessPoolExecutor) -> Chaos:
        args = self._args
        self._wait_until_ready()
        clients.submit(time.monotonic).result()  # their process takes a while to start
        closed = Load(0, CAPACITY_SHARE * args.seconds, clients=CLIENTS_PER_SLOT * args.max_num_seqs)
        at_capacity = clients.submit(run_clients, self._mix, closed)
        capacity = at_capacity.result()
        window = counted(capacity, args.seconds, CAPACITY_SHARE)
        requests_per_s = len(ended_in(capacity.visits, window)) / (window[1] - window[0])
        print(f"capacity: {requests_per_s:.2f} requests/s", flush=True)
        if not requests_per_s:
            raise RuntimeError("no request ended at capacity; give more --seconds")
        self._wait_until_idle()
        before, sums_before = self._census(), self._sums()
        opened = Load(len(capacity.visits), args.seconds, rate_per_s=args.overload * requests_per_s)
        overloading = clients.submit(run_clients, self._mix, opened)
        self._let_steps_fail()
        overload = overloading.result()
        sums = self._wait_until_idle()
        growth = {name: value - sums_before.get(name, 0.0) for name, value in sums.items()}
        info = self._service.engine.info
        return Chaos(
            capacity=capacity,
            requests_per_s=requests_per_s,
            overload=overload,
            overload_sums=growth,
            idle_sums=sums,
            before=before,
            after=self._census(),
            pool_fault=self._pool_fault(),
            num_blocks=info.num_blocks,
            failed_steps=self._faults.failed,
            broken=len(self._faults.broken),
        )

    def _let_steps_fail(self) -> None:
        """Every so often in the part of the overload that counts. Blocks until the last is due."""
        seconds, every_s = self._args.seconds, self._args.failure_every
        began_s = time.monotonic()
        for failure in range(round((1.0 - WARMUP_SHARE) * seconds / every_s)):
            due_s = began_s + WARMUP_SHARE * seconds + (failure + 0.5) * every_s
            time.sleep(max(0.0, due_s - time.monotonic()))
            self._faults.due += 1

    def _wait_until_ready(self) -> None:
        give_up_s = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            try:
                if httpx.get(f"{self._url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not accepting yet
            if time.monotonic() > give_up_s:
                raise TimeoutError("the server does not become ready")
            time.sleep(0.1)

    def _sums(self) -> Sums:
        sums: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(httpx.get(f"{self._url}/metrics", trust_env=False).text):
            for sample in family.samples:
                name = sample.name.removeprefix("dspark_")
                sums[name] += sample.value
                for value in sample.labels.values():
                    sums[f"{name}{{{value}}}"] += sample.value
        return dict(sums)

    def _wait_until_idle(self) -> Sums:
        """→ the metrics then; after IDLE_TIMEOUT_S whatever they are."""
        give_up_s = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            sums = self._sums()
            busy = sums["requests_running"] or sums["requests_waiting"] or sums["stream_clients"]
            if not busy or time.monotonic() > give_up_s:
                return sums
            time.sleep(0.2)

    def _census(self) -> Census:
        time.sleep(1.0)  # connections that clients have just closed are noticed
        gc.collect()
        loop = self._service.engine._tasks[0].get_loop()

        async def tasks() -> int:
            return len(asyncio.all_tasks())

        pooled = sum(thread.name.startswith("asyncio_") for thread in threading.enumerate())
        rss_pages = int(Path("/proc/self/statm").read_text().split()[1])
        info, free = self._service.engine.info, self._service.engine.gauges().blocks_free
        filled_bytes = (info.num_blocks - free) * info.kv_cache_bytes // info.num_blocks
        return Census(
            tasks=asyncio.run_coroutine_threadsafe(tasks(), loop).result(),
            threads=len(os.listdir("/proc/self/task")) - pooled,
            open_files=len(os.listdir("/proc/self/fd")),
            rss_bytes=rss_pages * os.sysconf("SC_PAGE_SIZE") - filled_bytes,
        )

    def _pool_fault(self) -> str | None:
        try:
            self._service.engine.scheduler.kv_cache.check()
        except AssertionError as error:
            return str(error)
        return None


Window = tuple[float, float]
"""From and to, of `time.monotonic()`."""


def counted(run: ClientsRun, seconds: float, share: float) -> Window:
    """The part of a load of `share` of `--seconds` that counts."""
    return run.began_s + WARMUP_SHARE * seconds, run.began_s + share * seconds


def ended_in(visits: Sequence[Visit], window: Window) -> list[Visit]:
    return [visit for visit in visits if window[0] <= visit.ended_s < window[1]]


def goodput(visits: Sequence[Visit], window: Window) -> float:
    """Tokens/s of the answers that were read to their end within the window."""
    completed = [visit for visit in ended_in(visits, window) if visit.outcome is Outcome.COMPLETED]
    return sum(visit.tokens for visit in completed) / (window[1] - window[0])


def median_of_buckets(sums: Sums, name: str) -> float:
    """Of a histogram, by linear interpolation within its bucket, as Prometheus does; NaN for no observation."""
    begin = f"{name}_bucket{{"
    buckets = sorted((float(key[len(begin) : -1]), n) for key, n in sums.items() if _is_bucket(key, begin))
    half = sums[f"{name}_count"] / 2
    low_s, below = 0.0, 0.0
    for top_s, count in buckets:
        if half and count >= half:
            return low_s if top_s == float("inf") else low_s + (top_s - low_s) * (half - below) / (count - below)
        low_s, below = top_s, count
    return float("nan")


def _is_bucket(key: str, begin: str) -> bool:
    """The keys by `le`, not those by another label's value."""
    try:
        return key.startswith(begin) and float(key[len(begin) : -1]) >= 0
    except ValueError:
        return False


def judge(chaos: Chaos, seconds: float) -> list[Claim]:
    """The first two are about time, all others must hold on any machine."""
    at_capacity = goodput(chaos.capacity.visits, counted(chaos.capacity, seconds, CAPACITY_SHARE))
    overloaded = goodput(chaos.overload.visits, counted(chaos.overload, seconds, 1.0))
    refusal_s = median_of_buckets(chaos.overload_sums, "refusal_seconds")
    ratio = overloaded / at_capacity if at_capacity else float("nan")
    return [
        Claim(f"goodput is at least {LEAST_GOODPUT:g} of that at capacity", ratio >= LEAST_GOODPUT, f"{ratio:.3f}"),
        Claim(
            f"refusals take less than {1e3 * MOST_REFUSAL_S:g} ms",
            refusal_s < MOST_REFUSAL_S,
            f"{1e3 * refusal_s:.1f} ms",
        ),
        *_claims_of_clients(chaos),
        *_claims_of_counts(chaos),
        *_claims_of_rest(chaos),
    ]


def _claims_of_clients(chaos: Chaos) -> list[Claim]:
    outcomes = Counter(visit.outcome for visit in chaos.overload.visits)
    read_slowly = sum(v.kind is Kind.SLOW and v.outcome is Outcome.COMPLETED for v in chaos.overload.visits)
    bad = [visit for run in (chaos.capacity, chaos.overload) for visit in run.visits]
    bad = [visit for visit in bad if visit.outcome in (Outcome.HUNG, Outcome.BROKEN)]
    hard = [outcomes[outcome] for outcome in (Outcome.REFUSED, Outcome.LEFT)] + [read_slowly, chaos.failed_steps]
    failed = outcomes[Outcome.FAILED]
    dead = [probe for probe in chaos.overload.probes if probe.status != 200]
    slowest_s = max((probe.seconds for probe in chaos.overload.probes), default=float("nan"))
    return [
        Claim("every request ends, and in a way that it should", not bad, f"{len(bad)} hung or broken"),
        Claim("it was hard: refused, left, read slowly, failed steps", all(hard), ", ".join(map(str, hard))),
        Claim(
            "only requests that break every step end with an error",
            failed <= chaos.broken,
            f"{failed} ended so, {chaos.broken} broke steps, {chaos.failed_steps} steps failed",
        ),
        Claim(
            "the server is live throughout",
            not dead and bool(chaos.overload.probes),
            f"{len(chaos.overload.probes) - len(dead)} of {len(chaos.overload.probes)} probes, slowest {slowest_s:.2f} s",
        ),
    ]


def _claims_of_counts(chaos: Chaos) -> list[Claim]:
    sums = chaos.overload_sums
    admitted, shed = sums["requests_admitted_total"], sums["requests_shed_total"]
    ended = sums["requests_total"]
    seen = Counter(str(visit.status) for visit in chaos.overload.visits if visit.status is not None)
    told = {status: round(sums.get(f"http_requests_total{{{status}}}", 0)) for status in ("429", "500", "503")}
    told["200"] = round(sums["http_requests_total{/v1/chat/completions}"]) - sum(told.values())
    return [
        Claim("requests = admitted + refused", ended == admitted + shed, f"{ended:.0f} = {admitted:.0f} + {shed:.0f}"),
        Claim("answers are counted as clients saw them", +Counter(told) == seen, f"{told}, seen {dict(seen)}"),
        Claim(
            "as many steps failed as were let fail",
            sums["engine_failed_steps_total"] == chaos.failed_steps,
            f"{sums['engine_failed_steps_total']:.0f}",
        ),
    ]


def _claims_of_rest(chaos: Chaos) -> list[Claim]:
    sums, before, after = chaos.idle_sums, chaos.before, chaos.after
    left = {name: round(sums[name]) for name in ("requests_running", "requests_waiting", "stream_clients")}
    left["blocks in use"] = round(sums["kv_cache_blocks{used}"])
    whole = chaos.pool_fault is None and sums["kv_cache_blocks"] == chaos.num_blocks
    growth = after.rss_bytes / before.rss_bytes - 1
    kept = (after.tasks, after.threads, after.open_files)
    return [
        Claim("nothing runs, waits or is held afterwards", not any(left.values()), f"{left}"),
        Claim("the pool is whole", whole, chaos.pool_fault or f"{chaos.num_blocks} blocks"),
        Claim(
            "tasks, threads and open files are no more than before",
            after.tasks <= before.tasks and after.threads <= before.threads and after.open_files <= before.open_files,
            f"{(before.tasks, before.threads, before.open_files)} → {kept}",
        ),
        Claim(
            f"resident memory without K/V grows by at most {MOST_RSS_GROWTH:.0%}",
            growth <= MOST_RSS_GROWTH,
            f"{before.rss_bytes / 2**20:.0f} → {after.rss_bytes / 2**20:.0f} MiB",
        ),
        Claim("SIGTERM ends it in order", chaos.exit_status == 0, f"exit status {chaos.exit_status}"),
    ]


def table(chaos: Chaos, seconds: float, overload: float) -> str:
    """One row per load. requests: begun. goodput, and what it is made of, is of the window that counts."""
    heads = ["load", "requests", *(o.value for o in Outcome if o not in (Outcome.BROKEN, Outcome.HUNG))]
    rows = [[*heads, "goodput tok/s", "clients' CPU", "sent late p99 ms"]]
    for name, load, share in (
        ("capacity", chaos.capacity, CAPACITY_SHARE),
        (f"{overload:g} × {chaos.requests_per_s:.2f} requests/s", chaos.overload, 1.0),
    ):
        outcomes = Counter(visit.outcome for visit in load.visits)
        late = sorted(visit.late_s for visit in load.visits)
        rows.append(
            [
                name,
                str(len(load.visits)),
                *(str(outcomes[outcome]) for outcome in Outcome if outcome.value in heads),
                f"{goodput(load.visits, counted(load, seconds, share)):.1f}",
                f"{load.cpu_s / (share * seconds):.0%}",
                f"{1e3 * late[int(0.99 * len(late))]:.1f}" if late else "-",
            ]
        )
    return align(rows)


def work_for_nothing(chaos: Chaos) -> str:
    """What clients of the overload had read of answers that they never had whole. A chunk is a step's tokens, mostly one."""
    chunks = dict.fromkeys(Outcome, 0)
    for visit in chaos.overload.visits:
        chunks[visit.outcome] += visit.chunks
    shares = {outcome: chunks[outcome] / max(1, sum(chunks.values())) for outcome in (Outcome.LEFT, Outcome.FAILED)}
    return f"{shares[Outcome.LEFT]:.1%} by clients that left, {shares[Outcome.FAILED]:.1%} in requests that broke steps"


def refusals_seen(chaos: Chaos) -> str:
    """The same refusals as the clients saw them, connection and their own delays included."""
    refused = [v.ended_s - v.sent_s for v in chaos.overload.visits if v.outcome is Outcome.REFUSED]
    return f"{1e3 * statistics.median(refused):.1f} ms" if refused else "-"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    load = parser.add_argument_group("Chaos")
    load.add_argument("--seconds", type=positive(float), default=120.0, help="of overload (default: %(default)g)")
    load.add_argument("--overload", type=positive(float), default=10.0, help="times capacity (default: %(default)g)")
    load.add_argument(
        "--failure-every", type=positive(float), default=30.0, metavar="S", help="under overload (default: %(default)g)"
    )
    load.add_argument(
        "--max-tokens", type=positive(int), default=64, help="of the longest answer (default: %(default)s)"
    )
    load.add_argument("--json", type=Path, metavar="OUT", help="write every number and the machine's facts here")
    add_serve_arguments(parser)
    # with more of both, requests of the warm-up would still be waiting when the window begins
    parser.set_defaults(port=0, log_level="error", max_num_seqs=16, max_queued_requests=64)
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    set_threading_environment(args.threads)
    with listen(args.host, args.port) as listener, ThreadPoolExecutor(1, "chaos") as beside:
        service = load_service(args, (), None)
        driving = beside.submit(Driver(service, listener.getsockname()[1], args).drive)
        exit_status = run(service, listener, args)
        chaos = driving.result()
    chaos.exit_status = exit_status
    machine = describe_machine()
    claims = judge(chaos, args.seconds)
    print(f"{machine.line()}\n\n{table(chaos, args.seconds, args.overload)}\n")
    print(f"refusals as clients saw them, median: {refusals_seen(chaos)}")
    print(f"of the chunks that were read, for nothing: {work_for_nothing(chaos)}\n")
    if args.json:
        facts: dict[str, object] = {
            "machine": machine.as_dict(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        facts |= {"chaos": asdict(chaos), "claims": [asdict(claim) for claim in claims]}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return print_claims(claims)


if __name__ == "__main__":
    raise SystemExit(main())
