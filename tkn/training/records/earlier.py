"""What an earlier run left in a run's folder: a run is never overwritten by another, and never done twice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from tkn.app.schema import flatten
from tkn.data import HOW_READ

#: Keys that say where and how a run shows itself, not what it is.
_FREE_KEYS = ("data_dir", "logger", "trainer.enable_progress_bar", *(f"data.{key}" for key in HOW_READ))


@dataclass(frozen=True)
class Earlier:
    """`summary`: of a finished run of the same configuration; `checkpoint`: of one that can be continued."""

    summary: dict[str, Any] | None = None
    checkpoint: Path | None = None


def earlier_run(folder: Path, config: DictConfig) -> Earlier:
    """What the folder holds of a run of `config`, a checked configuration; ValueError if it holds another one's run.

    A configuration whose `checkpoint` is the folder's own last.ckpt means to go on with whatever is there.
    """
    stored_path, last = folder / "config.yaml", folder / "last.ckpt"
    named = Path(config.checkpoint).expanduser() if config.checkpoint else None
    anything = stored_path.is_file() and (last.is_file() or (folder / "summary.json").is_file())
    if not anything or (config.mode == "train" and named is not None and named.resolve() == last.resolve()):
        return Earlier()
    try:
        stored: Any = OmegaConf.to_container(OmegaConf.create(stored_path.read_text(encoding="utf-8")))
        assert isinstance(stored, dict)
    except Exception as error:  # YAML's, OmegaConf's and the decoder's kinds
        raise ValueError(f"{stored_path} is damaged: choose another folder") from error
    present: Any = OmegaConf.to_container(config, resolve=True)
    # What a version before the key did is what its default does.
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(OmegaConf.get_type(config)))
    known = {key: value for key, value in flatten(defaults).items() if value != MISSING}
    before, now = known | flatten(stored), flatten(present)
    differing = [key for key in {**now, **before} if not key.startswith(_FREE_KEYS) and before.get(key) != now.get(key)]
    if differing:
        there, here = (", ".join(f"{key}={values.get(key)}" for key in differing) for values in (before, now))
        raise ValueError(
            f"{folder} holds another run, of {there}; this one is of {here}: "
            "choose another hydra.run.dir, or remove that folder"
        )
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Earlier(checkpoint=last if last.is_file() and config.mode == "train" else None)
    return Earlier(summary=summary)
