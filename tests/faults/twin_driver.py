"""Runs the diamond in many stores, each at the same moment as another process does. Started by test_two_drivers."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import engine
import toy_stages


def meet(folder: Path, me: str, num_drivers: int) -> None:
    """Return when all drivers have come here."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / me).touch()
    while len(list(folder.iterdir())) < num_drivers:
        time.sleep(0.001)


if __name__ == "__main__":
    root, store, me, num_drivers, num_rounds = sys.argv[1:]
    for number in range(int(num_rounds)):
        meet(Path(root) / "meeting" / str(number), me, int(num_drivers))
        result = engine.run(toy_stages.diamond(number), store)
        if result.status != "succeeded":
            raise SystemExit(f"round {number}: {result}")
