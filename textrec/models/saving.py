"""Save and load models: `config.json` beside `model.safetensors`, as on the hub."""

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from textrec.schema import InputError


class Saved:
    """Mixin for a module that is built from one dataclass, kept as `config` and named by `config_class`."""

    config_class: ClassVar[type]
    config: Any

    def save_pretrained(self, folder: Path) -> None:
        """Write both files; each appears whole or not at all."""
        from safetensors.torch import save_model

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights, config = (folder / f"{name}.partial-{os.getpid()}" for name in ("model.safetensors", "config.json"))
        save_model(self, str(weights))
        settings = {"model_type": type(self).__name__, **asdict(self.config)}
        config.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        os.replace(weights, folder / "model.safetensors")
        os.replace(config, folder / "config.json")

    @classmethod
    def from_pretrained(cls, folder: Path) -> Self:
        """Load what `save_pretrained` of this class, or of one of `kinds`, wrote, in evaluation mode.

        Raises InputError when a file is missing, the folder holds another model, or weights and configuration disagree.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{folder} holds no saved model: {name} is missing")
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = settings.pop("model_type", None)
        kind = next((each for each in cls.kinds() if each.__name__ == model_type), None)
        if kind is None:
            raise InputError(f"{folder} holds a {model_type}, not a {cls.__name__}")
        unknown = sorted(set(settings) - {each.name for each in fields(kind.config_class)})
        if unknown:
            raise InputError(
                f"{folder / 'config.json'} holds {unknown[0]!r}, which {kind.config_class.__name__} has not"
            )
        model = kind(kind.config_class(**settings))
        load_exactly(model, load_file(folder / "model.safetensors"), folder)
        return model.eval()

    @classmethod
    def kinds(cls) -> list[type]:
        """Return the classes that `from_pretrained` may find, by the name that the folder gives."""
        return [cls]


def load_exactly(model, weights: dict, source: object) -> None:
    """Copy weights into a model; InputError lists every name that is missing, unexpected or of another shape."""
    wanted = model.state_dict()
    differing = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - wanted.keys()),
        "of another shape": sorted(
            f"{name} {tuple(weights[name].shape)} for {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in weights and weights[name].shape != value.shape
        ),
    }
    if any(differing.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in differing.items() if names)
        raise InputError(f"{source} does not fit {type(model).__name__}: {listed}")
    model.load_state_dict(weights)
