"""Find the data files of the installation: recipes, in a wheel or in a checkout.

A wheel carries recipes/ inside the package; a checkout has the folder beside it.
"""

from importlib.resources import files
from pathlib import Path

from radhpc.core.errors import UserError, nearest


def folder(package: str) -> Path:
    """Return the folder of a package's data files; wheels are unpacked on the disk."""
    return Path(str(files(package)))


def recipes() -> Path:
    """Return the folder of the recipes that come with radhpc."""
    packaged = folder("radhpc") / "recipes"
    return packaged if packaged.is_dir() else folder("radhpc").parent / "recipes"


def recipe_names(sub: str = "") -> list[str]:
    """Return the names of radhpc's recipes, such as 'quickstart' and 'tiny/gla'; `sub`: those of a subfolder."""
    top = recipes() / sub
    return sorted(str(path.relative_to(top).with_suffix("")) for path in top.rglob("*.yaml"))


def find_recipe(name: str | Path, sub: str = "") -> Path:
    """Find a recipe by its path, or by the name of one that comes with radhpc. Raises UserError if there is neither.

    A path wins over a name. `recipes/x.yaml` is found from any folder. `sub`: a subfolder whose names also hold alone.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and path.suffix != ".yaml" and str(name) not in recipe_names():
        raise UserError(f"{name}: a folder; allowed are a YAML file and the name of a recipe ('radhpc recipes')")
    inside = path.relative_to("recipes") if len(path.parts) > 1 and path.parts[0] == "recipes" else path
    if not path.is_absolute() and ".." not in path.parts:
        for packaged in (recipes() / sub / inside.with_suffix(".yaml"), recipes() / inside.with_suffix(".yaml")):
            if packaged.is_file():
                return packaged
    names = [*recipe_names(), *(recipe_names(sub) if sub else [])]
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{name}: no such recipe{nearest(str(name), names)}; 'radhpc recipes' lists them")
    siblings = sorted(file.name for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) or nearest(str(inside.with_suffix("")), names)
    raise UserError(f"{name}: no such file{hint}; 'radhpc recipes' lists those that come with radhpc")


def install_hint(extra: str) -> str:
    """Return the command that installs an extra, for a checkout or a wheel."""
    checkout = folder("radhpc").parent / "pyproject.toml"
    target = f"-e '.[{extra}]' in {checkout.parent}" if checkout.exists() else f"'WHEEL[{extra}]', with radhpc's wheel"
    return f"pip install {target}"
