"""The ``simtoreal`` command: finds the verb, reads its flags, runs it.

A verb is a module of ``simtoreal.commands`` with a ``Config`` dataclass (its fields are the flags) and
``main(config)``. Only the chosen verb's module is imported, so that help is fast and never waits for torch; listing
the verbs imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = Path(__file__).parent / "commands"

# Verbs made of two words: ``simtoreal data info`` is the module ``data_info``.
GROUPS = {
    "data": "Datasets: import, export, inspect, check, edit, filter, measure diversity, merge, split, view, recover.",
    "world-model": "Video world models: train, evaluate, play, post-train; inverse-dynamics models.",
}

LARGEST_NUMBER = 2**62
EXIT_FAILURE = 2
EXIT_INTERRUPTED = 130


def verbs() -> dict[str, str]:
    """Return every verb (``"train"``, ``"data info"``) with its one-line description, importing nothing.

    The description is the first line of the module's docstring.
    """
    found = {}
    for path in sorted(COMMANDS.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        with open(path, encoding="utf-8") as handle:
            first_line = handle.readline()
        found[_verb_name(path.stem)] = first_line.strip().strip('"')
    return found


def _verb_name(module: str) -> str:
    for group in GROUPS:
        prefix = group.replace("-", "_") + "_"
        if module.startswith(prefix):
            return f"{group} {module.removeprefix(prefix).replace('_', '-')}"
    return module.replace("_", "-")


def _module_name(verb: str) -> str:
    return "simtoreal.commands." + verb.replace(" ", "_").replace("-", "_")


def _overview(group: str | None = None) -> str:
    """Return the help text of ``simtoreal`` or of one group."""
    import simtoreal

    listed = {name: text for name, text in verbs().items() if group is None or name.startswith(f"{group} ")}
    width = max(len(name) for name in listed)
    title = f"simtoreal {simtoreal.__version__} - from demonstration to hardware" if group is None else GROUPS[group]
    usage = "simtoreal VERB [flags]" if group is None else f"simtoreal {group} VERB [flags]"
    rows = [f"  {name:<{width}}  {text}" for name, text in listed.items()]
    return "\n".join(
        [
            title,
            "",
            f"usage: {usage}",
            "",
            *rows,
            "",
            f"{usage.removesuffix(' [flags]')} --help shows the flags of a verb, with units and defaults.",
            "--config preset.yaml gives any verb its flags from a file; flags on the command line win.",
        ]
    )


def _split_verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb and the arguments that belong to it.

    Raises:
        ConfigError: there is no such verb.
    """
    known = verbs()
    first, rest = arguments[0], list(arguments[1:])
    if first in known:
        return first, rest
    from simtoreal.envs.errors import ConfigError, closest

    if first in GROUPS:
        second = rest.pop(0)
        if f"{first} {second}" not in known:
            options = [name.removeprefix(f"{first} ") for name in known if name.startswith(f"{first} ")]
            raise ConfigError(f"'simtoreal {first}' has no verb '{second}'. {closest(second, options)}")
        return f"{first} {second}", rest
    raise ConfigError(f"simtoreal has no verb '{first}'. {closest(first, known)}")


def _take_preset(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Remove ``--config PATH`` from ``arguments`` and return the path."""
    rest = []
    preset = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config" or argument.startswith("--config="):
            value = argument.removeprefix("--config").removeprefix("=") or next(remaining, "")
            if not value:
                from simtoreal.envs.errors import ConfigError

                raise ConfigError("--config needs the path of a yaml file")
            preset = Path(value)
        else:
            rest.append(argument)
    return preset, rest


def _shipped_preset(preset: Path, folder: str | None) -> Path:
    """Return the file of a preset given by its name alone (``--config cpu``), or the path as it is.

    Args:
        preset: name or path.
        folder: of the verb's presets in ``configs``; None if it has none.

    Raises:
        ConfigError: no preset of this name ships with the package.
    """
    if preset.suffix or len(preset.parts) != 1 or preset.exists():
        return preset
    if folder is None:
        from simtoreal.envs.errors import ConfigError

        raise ConfigError(f"--config '{preset}' is no file, and this command has no shipped presets")
    shipped = _presets(folder)
    if preset.name not in shipped:
        from simtoreal.envs.errors import ConfigError, closest

        raise ConfigError(f"--config '{preset}' is no file and no shipped preset. {closest(preset.name, shipped)}")
    return shipped[preset.name]


def _presets(folder: str) -> dict[str, Path]:
    import simtoreal.configs

    return {path.stem: path for path in sorted((Path(simtoreal.configs.__path__[0]) / folder).glob("*.yaml"))}


def _description(module: Any) -> str:
    """Return what the help of a verb begins with; ``--config`` is no field of its ``Config``, so it is said here."""
    text = f"{module.__doc__.strip()}\n\n--config FILE.yaml gives flags from a file; those on the command line win."
    if (folder := getattr(module, "PRESETS", None)) is not None:
        text += f" Shipped presets, by their name alone: {', '.join(_presets(folder))}."
    return text


def _read_flags(verb: str, module: Any, arguments: list[str]) -> Any:
    """Return the verb's ``Config``: its defaults, then the preset, then the command line."""
    import tyro

    preset, arguments = _take_preset(arguments)
    if preset is not None:
        preset = _shipped_preset(preset, getattr(module, "PRESETS", None))
    # A preset may leave required flags to the command line, so it becomes tyro's defaults rather than a Config.
    options: dict[str, Any] = {}
    if preset is not None:
        from simtoreal.envs.config import load_fields

        given = load_fields(module.Config, preset)
        defaults = object.__new__(module.Config)
        for field in dataclasses.fields(module.Config):
            object.__setattr__(defaults, field.name, given.get(field.name, _field_default(field, tyro.MISSING)))
        options["default"] = defaults
    config = tyro.cli(
        module.Config,
        prog=f"simtoreal {verb}",
        description=_description(module),
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
        **options,
    )
    _require_countable(config, "")
    return config


def _field_default(field: dataclasses.Field[Any], required: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return required


def run(arguments: Sequence[str]) -> None:
    """Run one command line (without the program's name).

    Raises:
        SimtorealError: whatever the verb could not do, with a message for the user.
        SystemExit: a flag is wrong (2), help was asked for (0), or the verb found a problem (1).
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if arguments[0] == "--version":
        import simtoreal

        print(f"simtoreal {simtoreal.__version__}")
        return
    if arguments[0] in GROUPS and (len(arguments) == 1 or arguments[1] in ("-h", "--help")):
        print(_overview(arguments[0]))
        return
    verb, rest = _split_verb(arguments)
    module = importlib.import_module(_module_name(verb))
    module.main(_read_flags(verb, module, rest))


def _explain(error: Exception) -> str:
    """Return the message for the user; an error that nobody foresaw is raised again, with its traceback."""
    from simtoreal.envs.errors import SimtorealError
    from simtoreal.envs.files import DISK_FULL_ERRNOS, UNUSABLE_ERRNOS, describe_disk_error

    if isinstance(error, SimtorealError):
        return f"{type(error).__name__}: {error}"
    # ENOENT: a file system such as /proc has no place for new files.
    if (
        isinstance(error, OSError)
        and error.filename
        and error.errno in (*DISK_FULL_ERRNOS, *UNUSABLE_ERRNOS, errno.ENOENT)
    ):
        place = os.fsdecode(error.filename)
        if error.errno in DISK_FULL_ERRNOS:
            return describe_disk_error(error, place)
        return f"{place}: cannot be used ({error.strerror}). Choose another place, or change what is in the way."
    raise error


def _require_countable(value: Any, name: str) -> None:
    """Refuse numbers with which nothing can be computed anywhere in the flags.

    No flag means anything by NaN and infinity (and ``nan <= 0`` is false), nor by whole numbers near the end of 64
    bits, from which seeds could not be counted on.
    """
    import math

    from simtoreal.envs.errors import ConfigError

    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected a finite number")
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected at most {LARGEST_NUMBER}")
    if dataclasses.is_dataclass(value):
        inner = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, (tuple, list)):
        inner = [("", item) for item in value]
    else:
        return
    for key, item in inner:
        _require_countable(item, ".".join(filter(None, (name, str(key)))))


def main() -> None:
    """Console entry point: exit status 0 on success, 2 on a user's error, 130 when interrupted."""
    try:
        run(sys.argv[1:])
    except KeyboardInterrupt:
        # Impatient people press twice: signal.signal first raises what is pending, and then has changed nothing.
        with contextlib.suppress(KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # An interruption that went through code in a string (of a dataclass being made, for instance) counts as
        # unhandled for Python until the next such code has ended: 'python -m simtoreal' would end by SIGINT.
        exec("")
        print("simtoreal: interrupted", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of our output went away (``simtoreal list tasks | head``); keep Python from failing again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_FAILURE) from None
    except Exception as error:
        print(f"simtoreal: {_explain(error)}", file=sys.stderr)
        raise SystemExit(EXIT_FAILURE) from None
