"""What the words of a command stand for: configurations, run folders, models."""

from pathlib import Path

from dsjax.config import Config, ConfigError, load, nearest, show


def find_config(source: str, phase: str | None = None) -> tuple[Config, Path | None]:
    """The configuration of a preset or its phase, of a .json file or of a run folder, and that folder."""
    import configs

    path = Path(source)
    if phase is not None:
        if source.replace("-", "_") not in configs.PRESETS and path.exists():
            raise ConfigError(f"--phase={show(phase)}: expected a preset before it, and {show(source)} is none")
        return configs.load(source, phase), None
    if source.replace("-", "_") in configs.PRESETS:
        return configs.load(source), None
    if source and (path / "config.json").exists():
        return load(path / "config.json"), path
    if path.suffix == ".json":
        return load(path), None
    if source and path.is_dir():
        raise ConfigError(f"{show(source)}: expected a preset or a run folder, and this folder has no config.json")
    if "/" in source:
        raise ConfigError(unknown_run(source))
    return configs.load(source), None


def with_devices(changes: dict[str, str], devices: int | None) -> dict[str, str]:
    return changes if devices is None else changes | {"distributed.devices": str(devices)}


def find_run(source: str) -> Path:
    path = Path(source)
    if not source or not path.is_dir():
        raise ConfigError(unknown_run(source))
    if not (path / "config.json").exists():
        raise ConfigError(f"{show(source)}: expected a run folder, and this folder has no config.json")
    return path


def find_model(source: str) -> Path:
    """A run folder or Hub folder; a Hub name is fetched, unless it stands for a path whose parent exists."""
    path = Path(source).expanduser()
    if source and not path.exists() and (source.count("/") != 1 or path.parent.is_dir()):
        raise ConfigError(unknown_run(source))
    from dsjax.hub.fetch import resolve

    return resolve(source) if source and not path.is_dir() else find_run(source)


def unknown_run(source: str) -> str:
    parents = dict.fromkeys([Path("runs"), Path(source).parent])  # `dsjax generate tiny` means runs/tiny
    runs = [str(run.parent) for parent in parents for run in sorted(parent.glob("*/config.json"))]
    near = nearest(Path(source).name, [f"{Path(run).name}" for run in runs])[:1]
    found = next((run for run in runs if Path(run).name in near), None)
    hint = f"the nearest is {found}" if found else "`dsjax train tiny` makes runs/tiny"
    return f"{show(source)}: no such run folder; {hint}"
