"""A soak: rounds of random pipelines whose drivers are killed, stopped and interrupted, and whose files are damaged.

    python tests/faults/soak.py --minutes 10 [--seed 7] [--store s3://bucket/prefix]

Every round has a store and a pipeline of its own. Several drivers run variants of the pipeline on the one store,
some with `--force`, while they are disturbed and garbage is collected. When they have ended, files are damaged, and it
goes on. (In some rounds nothing is forced, damaged or collected, so that more is known of what must be.) In the end
undisturbed drivers finish the work, and all of invariants.py must hold. What a seed decides is the pipelines and
the order of disturbances; how the processes interleave is luck. A round that breaks an invariant keeps its folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import invariants
from faults.random_pipelines import random_pipeline

from ropewalk.infra.plan import Planner
from ropewalk.infra.store import Store
from ropewalk.infra.upkeep import garbage

DRIVER = Path(__file__).with_name("soak_driver.py")
LEASE_SECONDS = 1.5
DAMAGES = ("truncate", "flip", "delete file", "delete manifest", "empty commit")


@dataclass
class Driver:
    """A driver that was started, and what was done to it."""

    process: subprocess.Popen[str]
    log: Path
    disturbed: bool = False
    continue_at: float | None = None
    """When a stopped driver is to go on."""

    def send(self, number: int) -> None:
        self.disturbed = True
        if self.process.poll() is None:
            self.process.send_signal(number)


@dataclass
class Round:
    """One store, one random pipeline in several variants, many drivers."""

    seed: int
    folder: Path
    store_uri: str
    seconds: float
    num_drivers: int = 3
    tally: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    more: Counter[str] = field(default_factory=Counter)
    """How often a key was forced, damaged or collected: so many more commits it may have had."""
    cleaned: set[str] = field(default_factory=set)
    """Keys whose scratch folder was collected."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.draw = random.Random(self.seed)
        self.drivers: list[Driver] = []
        self.journal = self.folder / "journal"
        self.store = self._elsewhere()
        self.strict = self.draw.random() < 0.4
        """Nothing is forced, damaged or collected: then every key is committed exactly once."""
        self.variants = range(self.draw.choice((2, 5)))

    def play(self) -> list[str]:
        """Everything, then the invariants; returns what is broken."""
        expected = self._undisturbed()
        if self.broken:
            return self.broken
        until = time.monotonic() + self.seconds
        while not self.broken and time.monotonic() < until:
            self._fire(self.seconds / 3)
            self._quiet()
            if not self.strict:
                self._damage()
        self._check(expected)
        return self.broken

    def _undisturbed(self) -> dict[int, dict[str, str | None]]:
        """Digests by variant and step, from a store where nothing went wrong."""
        calm = {"SOAK_UNREST": "0", "SOAK_JOURNAL": ""}
        store = str(self.folder / "undisturbed")
        return {variant: self._finish(store, variant, calm) for variant in self.variants}

    def _finish(self, store: str, variant: int, environment: Mapping[str, str]) -> dict[str, str | None]:
        """Run a driver to its end; returns the digests."""
        driver = self._start(store, variant, environment)
        driver.process.wait()
        if driver.process.returncode != 0:
            self.broken.append(f"an undisturbed driver failed: {driver.log.read_text()[-1000:]}")
            return {}
        return json.loads(driver.log.read_text().splitlines()[-1])["digests"]

    def _start(self, store: str, variant: int, environment: Mapping[str, str], *force: str) -> Driver:
        self.tally["drivers"] += 1
        log = self.folder / f"driver-{self.tally['drivers']:03d}.log"
        inherited = {
            **os.environ,
            "SOAK_ROUND": self.folder.name,
            "SOAK_UNREST": "1",
            "SOAK_JOURNAL": str(self.journal),
            "ROPEWALK_LEASE_SECONDS": str(LEASE_SECONDS),
            # Every driver is a machine of its own as far as an object store is concerned.
            "ROPEWALK_SCRATCH": str(self.folder / "scratch" / str(self.tally["drivers"])),
            **environment,
        }
        command = [sys.executable, str(DRIVER), store, str(self.seed), str(variant), *force]
        with log.open("w") as file:
            process = subprocess.Popen(command, env=inherited, stdout=file, stderr=file, text=True)
        return Driver(process, log)

    def _fire(self, seconds: float) -> None:
        """Keep several drivers running and disturb them."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._reap()
            while len(self.drivers) < self.num_drivers:
                self._start_random()
            time.sleep(self.draw.uniform(0.05, 0.6))
            actions = (self._kill, self._stop, self._interrupt, self._cut_power, self._collect, self._nothing)
            self.draw.choices(actions, weights=(4, 3, 2, 2, 0 if self.strict else 3, 5))[0]()

    def _start_random(self) -> None:
        variant = self.draw.choice(self.variants)
        force = []
        if not self.strict and self.draw.random() < 0.15:
            # Only a step whose key is known beforehand can be accounted for.
            plans = [p for p in Planner(random_pipeline(self.seed, variant), self.store).plan() if p.key]
            chosen = self.draw.choice(plans)
            self.more[str(chosen.key)] += 1
            force = [chosen.name]
            self.tally["forced"] += 1
        self.drivers.append(self._start(self.store_uri, variant, {}, *force))

    def _kill(self) -> None:
        self._pick("killed").send(signal.SIGKILL)

    def _cut_power(self) -> None:
        """Kill all at once; those that start next race for what they held."""
        self.tally["power cuts"] += 1
        for driver in self.drivers:
            driver.send(signal.SIGKILL)
            driver.process.wait()

    def _interrupt(self) -> None:
        driver = self._pick("interrupted")
        driver.send(self.draw.choice([signal.SIGTERM, signal.SIGINT]))
        if self.draw.random() < 0.3:
            time.sleep(0.05)
            driver.send(signal.SIGINT)

    def _stop(self) -> None:
        """Stop a driver for longer than its lease lasts, or for a moment."""
        driver = self._pick("stopped")
        driver.send(signal.SIGSTOP)
        driver.continue_at = time.monotonic() + self.draw.choice([0.3, 2 * LEASE_SECONDS])

    def _collect(self) -> None:
        """Collect garbage beside the drivers. A commit that is removed must not be one that a driver relies on."""
        self.tally["collections"] += 1
        for item in garbage.collect(self.store, garbage.Policy(keep_runs=2, grace_seconds=0.5), act=True):
            if item.number is not None and item.state in ("removed", "in use"):
                # Also what turned out to be in use counted no more for a moment, in which a run makes it again.
                self.tally["collected commits"] += item.state == "removed"
                self.more[item.key] += 1
            elif item.state == "removed":
                self.cleaned.add(item.key)

    def _nothing(self) -> None:
        self.tally["left alone"] += 1

    def _pick(self, what: str) -> Driver:
        self.tally[what] += 1
        return self.draw.choice(self.drivers)

    def _reap(self) -> None:
        """Let stopped drivers go on when it is time, and judge those that have ended."""
        for driver in self.drivers:
            if driver.continue_at is not None and time.monotonic() >= driver.continue_at:
                driver.continue_at = None
                driver.send(signal.SIGCONT)
            code = driver.process.poll()
            if code is not None and code != 0 and not driver.disturbed:
                self.broken.append(
                    f"a driver that nobody disturbed ended with {code}: {driver.log.read_text()[-1000:]}"
                )
        self.drivers = [driver for driver in self.drivers if driver.process.poll() is None]

    def _quiet(self, seconds: float = 60.0) -> None:
        """Wait until every driver has ended."""
        until = time.monotonic() + seconds
        while self.drivers and time.monotonic() < until:
            time.sleep(0.1)
            self._reap()
        for driver in self.drivers:
            self.broken.append(f"process {driver.process.pid} does not end: {driver.log.read_text()[-1000:]}")
            driver.process.kill()
            driver.process.wait()
        self.drivers = []
        orphans = invariants.processes_with("SOAK_ROUND", self.folder.name)
        if orphans:
            self.broken.append(f"processes {orphans} outlived their drivers")

    def _damage(self) -> None:
        """Damage the outputs of up to three keys. What a look at names and sizes does not find, verification finds."""
        committed = [c for key in self.store.objects.names("objects") if (c := self.store.latest(key)[0])]
        for commit in self.draw.sample(committed, min(len(committed), self.draw.choice([1, 2, 3]))):
            kind = self.draw.choice(DAMAGES)
            self.tally[kind] += 1
            name = damage(self.store, commit.key, commit.attempt.name, commit.number, kind)
            self.more[commit.key] += 1
            if kind == "flip":
                problems = self.store.problems(commit, deep=True)
                if not any(name in problem for problem in problems):
                    self.broken.append(f"verification did not find {name}: {problems}")
                self.store.withdraw(commit.key, commit.number, "soak", problems[0])
            elif self._elsewhere().latest(commit.key)[0] == commit:
                self.broken.append(f"{kind} of {name} was not noticed")

    def _elsewhere(self) -> Store:
        """The store as a machine sees it that has not seen it before: nothing of an object store is kept here."""
        os.environ["ROPEWALK_SCRATCH"] = tempfile.mkdtemp(dir=self.folder)
        return Store(self.store_uri)

    def _check(self, expected: Mapping[int, Mapping[str, str | None]]) -> None:
        for variant in self.variants:
            found = self._finish(self.store_uri, variant, {"SOAK_UNREST": "0"})
            self.broken += [f"variant {variant}: {line}" for line in invariants.wrong_digests(found, expected[variant])]
        for variant in self.variants:
            planned = Planner(random_pipeline(self.seed, variant), self._elsewhere()).plan()
            self.broken += [
                f"variant {variant}: {p.name} is done and yet {p.reason}" for p in planned if p.status != "reuse"
            ]
        self.broken += self._invariants()
        self.tally["commits"] = sum(
            len(self.store.objects.names(f"objects/{key}/commits")) for key in self.store.objects.names("objects")
        )
        self.tally["executions"] = sum(entry["what"] == "began" for entry in invariants.read_journal(self.journal))

    def _invariants(self) -> Iterator[str]:
        yield from invariants.broken_commits(self.store, self.more)
        yield from invariants.broken_leases(self.store, drivers_ended=True)
        yield from invariants.repeated_work(self.store, self.journal, excused=self.more)
        yield from invariants.broken_records(self.store)
        yield from invariants.lost_commits(self.store, excused=self.more)
        if self.store.is_local:
            yield from invariants.lost_work(self.journal, excused={*self.more, *self.cleaned})


def damage(store: Store, key: str, attempt: str, number: int, kind: str) -> str:
    """Damage a committed output; returns the name of the object that was hit."""
    folder = f"objects/{key}/attempts/{attempt}"
    part = f"{folder}/data/{store.objects.names(f'{folder}/data')[0]}"
    commit = f"objects/{key}/commits/{number:06d}.json"
    name = {"delete manifest": f"{folder}/manifest.json", "empty commit": commit}.get(kind, part)
    content = store.objects.read(name)
    if kind.startswith("delete"):
        store.objects.remove(name)
    elif kind == "truncate":
        store.objects.write(name, content[:-1])
    elif kind == "flip":
        store.objects.write(name, bytes([content[0] ^ 1]) + content[1:])
    else:
        store.objects.write(name, b"")
    return name


def soak(minutes: float, seed: int, *, store: str | None, round_seconds: float, num_drivers: int) -> int:
    """Rounds until the time is up or one breaks an invariant; returns how many did."""
    until, number, failed = time.monotonic() + 60 * minutes, 0, 0
    home = Path(tempfile.mkdtemp(prefix="ropewalk-soak-"))
    while not failed and (number == 0 or time.monotonic() < until):
        folder = home / f"round-{seed + number}"
        uri = f"{store.rstrip('/')}/{folder.name}-{os.getpid()}" if store else str(folder / "store")
        this = Round(seed + number, folder, uri, round_seconds, num_drivers)
        broken = this.play()
        told = ", ".join(f"{value} {name}" for name, value in sorted(this.tally.items()))
        print(f"seed {this.seed}: {'BROKEN' if broken else 'ok'}; {told}", flush=True)
        for line in broken:
            print(f"  {line}", flush=True)
        if broken:
            failed += 1
            print(f"  its files are kept in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        number += 1
    print(f"{number} rounds, {failed} broken; first seed {seed}")
    if not failed:
        shutil.rmtree(home, ignore_errors=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description="Disturb drivers and check that the store holds what it promises.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; the next ones count up")
    parser.add_argument("--store", help="an object store's URI instead of local folders")
    parser.add_argument("--round-seconds", type=float, default=15.0)
    parser.add_argument("--drivers", type=int, default=3)
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    print(f"soak of {given.minutes:g} minutes, seed {seed}", flush=True)
    failed = soak(given.minutes, seed, store=given.store, round_seconds=given.round_seconds, num_drivers=given.drivers)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
