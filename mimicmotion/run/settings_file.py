"""Settings of a run from a YAML file, which may name stages, and back.

    preset: mimicmotion-72                 # where what is not named comes from
    run_dir: runs/dance
    optimizer: {learning_rate: 1e-5}
    stages:                                # one after the other; each says in what it differs from the above
      - data: {height: 576, width: 320, num_frames: 16, prepared: data/prepared/dance-small}
        trainer: {num_steps: 20000}
      - trainer: {num_steps: 10000}

A file stands for words of the command line, so both are read, checked and refused alike, and later words win: the
file's, then the stage's, then those that were typed.
"""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mimicmotion.config import Config
from mimicmotion.data.cache import write_text
from mimicmotion.json_values import to_json
from mimicmotion.paths import check_there

STAGES = "stages"
FILE = "settings.yaml"  # of a run, as they were resolved


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The words that a file stands for, and those of each of its stages; none without stages.

    Raises ValueError where it is not there, is no YAML, or names what is no setting.
    """
    check_there("--settings", path, "give a YAML file of settings")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--settings: {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"--settings: {path} holds {type(found).__name__}, wanted settings by name, as run_dir: runs/x"
        )
    stages = found.pop(STAGES, [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"--settings: {STAGES} of {path} is no list of settings; begin each stage with '- '")
    return _words(found, Config, f"{path}: "), [
        _words(stage, Config, f"{path}, stage {number}: ") for number, stage in enumerate(stages, 1)
    ]


def write(config: Config, folder: Path) -> None:
    """Write all settings into the folder, so that --settings reads the same again."""
    write_text(folder / FILE, yaml.safe_dump(to_json(config), sort_keys=False))


def _words(settings: Mapping[str, Any], kind: type, where: str, prefix: str = "") -> list[str]:
    """Of settings of one dataclass, whose dotted name begins with prefix."""
    hints, words = typing.get_type_hints(kind), []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ValueError(f"{where}there is no setting {prefix}{key}; there are {', '.join(sorted(hints))}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                raise ValueError(f"{where}{prefix}{name} is {value!r}; give its settings by name")
            words += _words(value, typing.cast(type, hints[name]), where, f"{prefix}{name}.")
        elif isinstance(value, bool):
            words.append(f"--{prefix}{'' if value else 'no-'}{name}".replace("_", "-"))
        else:
            flat = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
            parts = flat if isinstance(flat, list) else [flat]
            if parts:
                words += [f"--{prefix}{name}".replace("_", "-"), *map(str, parts)]
    return words
