"""`driftstream new`: a plug-in or preset that works, to be changed."""

import re
import shlex
from pathlib import Path

from driftstream.launch.flags import NewFlags, UsageError

TEMPLATES = Path(__file__).parent / "templates"
SUFFIX = {"actor": ".py", "refiner": ".py", "target": ".py", "preset": ".toml"}
RUN = {
    "actor": "driftstream train gmm9 --actors explore:1,{place}:1",
    "refiner": "driftstream train gmm9 --refiners {place}:1",
    "target": "driftstream train {place} --minutes 3",
    "preset": "driftstream train gmm9 --method {place}",
}


def new(flags: NewFlags) -> int:
    """Write a template to a file that is not there yet, and print the commands that check and run it.

    Raises:
        UsageError: a file that exists, a directory that does not, or a name that makes no class.
    """
    path, kind = flags.file, flags.kind
    suffix = SUFFIX[kind]
    if path.suffix != suffix:
        raise UsageError(f"{path}: expected a name that ends in {suffix}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: the directory does not exist")
    text = template(kind, path)
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists, and is left as it is") from None
    place = str(path) if kind == "preset" else f"{path}:{class_name(kind, path)}"
    print(f"{kind:<7} {path}")
    for label, command in (("check", "driftstream check {place}"), ("run", RUN[kind])):
        print(f"{label:<7} {command.format(place=shlex.quote(place))}")
    return 0


def template(kind: str, path: Path) -> str:
    """The template's text, with the file's own name and class."""
    text = (TEMPLATES / f"{kind}{SUFFIX[kind]}").read_text()
    text = text.replace(f"my_{kind}{SUFFIX[kind]}", path.name)
    return text if kind == "preset" else text.replace(f"My{kind.capitalize()}", class_name(kind, path))


def class_name(kind: str, path: Path) -> str:
    """The class for a file: MyActor for my_actor.py; UsageError for a stem that makes none."""
    words = re.split(r"[^0-9a-zA-Z]+", path.stem)
    name = "".join(word[0].upper() + word[1:] for word in words if word)
    if not re.match(r"[A-Z]", name):
        raise UsageError(f"{path}: expected a name that starts with a letter, as a class is named after it")
    # Options and Target are names that the template has already.
    taken = re.search(rf"\b{name}\b", (TEMPLATES / f"{kind}.py").read_text())
    return f"My{name}" if taken and name != f"My{kind.capitalize()}" else name
