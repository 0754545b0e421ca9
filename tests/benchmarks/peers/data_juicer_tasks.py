"""The shared tasks in Data-Juicer, from JSON Lines: TASK INPUT OUTPUT TOKENIZER. One process, no cache.

After its last operator it frees the memory of models on a GPU and for this would install CUDA's torch, gigabytes of it.
There is no model here, so that call is left out, which spares it the seconds of the import; nothing is installed.
"""

from __future__ import annotations

from process_report import report  # isort: skip  (starts the clock)

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_juicer.config import init_configs
from data_juicer.core import DefaultExecutor
from data_juicer.ops import base_op
from data_juicer.utils import lazy_loader

NEAR = {"tokenization": "space", "window_size": 5, "num_permutations": 128, "jaccard_threshold": 0.8}


def _refuse(package: str, *_: Any) -> None:
    # No ImportError: it would be caught, and tried again for ever.
    raise SystemExit(f"peers/data-juicer.txt lacks {package}")


def _process(*steps: dict[str, Any]) -> Callable[[Path, Path, Path], None]:
    def run(source: Path, output: Path, tokenizer: Path) -> None:
        config = {
            "project_name": "peer",
            "dataset_path": str(source),
            "export_path": str(output / "kept/kept.parquet"),
            "export_type": "parquet",
            "work_dir": str(output / "work"),
            "ds_cache_dir": str(output / "cache"),
            "np": 1,
            "use_cache": False,
            "open_monitor": False,
            "process": list(steps),
        }
        path = output / "config.yaml"  # JSON is YAML.
        path.write_text(json.dumps(config))
        DefaultExecutor(init_configs(["--config", str(path)])).run()

    return run


if __name__ == "__main__":
    lazy_loader.LazyLoader._install_package = _refuse
    base_op.free_models = lambda: None
    report({
        "read": _process(),
        "exact": _process({"document_deduplicator": {"lowercase": False, "ignore_non_character": False}}),
        "near": _process({"document_minhash_deduplicator": NEAR}),
    })  # fmt: skip
