"""Peak memory of an engine, measured in a process of its own (Linux)."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from tkn.bench.config import check_config
from tkn.bench.engines import TIMED_ENGINES
from tkn.bench.networks import build_networks, images_and_labels

#: Whose memory is compared: torch eager and this project's engine.
MEASURED = ("torch", "torch-masked", "tkn")


def measure_memory(config_path: Path, network: str, engine: str, batch: int) -> dict[str, Any]:
    """Resident memory in MiB of inference: `before` the engine is made, at its `peak`, and the `increase`.

    In a fresh process. RuntimeError with its last line if it fails.
    """
    command = [sys.executable, "-m", "tkn.bench.memory", str(config_path), network, engine, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(config: DictConfig, network_name: str, engine_name: str, batch: int) -> dict[str, float]:
    torch.set_num_threads(config.threads or torch.get_num_threads())
    network = next(network for network in build_networks(config) if network.name == network_name)
    engine = TIMED_ENGINES[engine_name]
    assert engine.infer is not None
    images, _ = images_and_labels(config, batch)
    with torch.inference_mode():
        network.model(images[:1])  # what the libraries set up once is nobody's
    gc.collect()
    # Memory that was freed but not returned would hide what the engine takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident_mib("VmRSS")
    inference = engine.infer(network.model, images, torch.get_num_threads())
    with torch.inference_mode():
        for _ in range(3):
            inference.call()
    peak = _resident_mib("VmHWM")
    return {"before_mib": before, "peak_mib": peak, "increase_mib": round(peak - before, 1)}


def _resident_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    config_path, network_name, engine_name, batch = sys.argv[1:]
    config = OmegaConf.load(config_path)
    assert isinstance(config, DictConfig)
    print(json.dumps(_measure(check_config(config), network_name, engine_name, int(batch))))
