"""Exports a trained model as PEFT's adapter or as whole weights for plain transformers; neither needs radhpc.

    export(context, out, merge=False)   # adapter_config.json, adapter_model.safetensors; base/ where the run changed it
    export(context, out, merge=True)    # config.json, model-*.safetensors, the adapters added in
    check(out, ...)                   # a process that cannot import radhpc gives the same logits

Beside the weights lie processor, tokenizer, generation settings, README.md (the model card) and example.py
(templates/example.py), which shows how to use it. Classes that transformers does not have (the fusion of
hierarchical_fusion.py, the connectors of connector.py) are exported as standalone files, which transformers loads by
`auto_map`. The heads of objectives are not needed to answer: heads.safetensors keeps them. The folder appears
complete: it is written under another name and renamed.
"""

import copy
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from modulefinder import ModuleFinder
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from radhpc.core.compat_torch import module_table
from radhpc.core.errors import UserError
from radhpc.core.resources import folder as folder_of
from radhpc.data.collate import TARGET_KEYS, StudyEncoder
from radhpc.models import adapters
from radhpc.models.adapters import Tensors
from radhpc.models.image_processors import ClipImages
from radhpc.serving.model_card import base_folder, card
from radhpc.serving.templates.example import SETTINGS
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder, build_family
from radhpc.training.engine_builder import restore_engine

SHARD = "5GB"  # the largest file of the weights
HEADS = "heads.safetensors"
_WITHOUT_RADHPC = folder_of("radhpc.serving.templates") / "without_radhpc.py"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-3}  # of the largest logit


@dataclass(frozen=True)
class Exported:
    """A written export."""

    out: Path
    kind: str  # "adapter" or "model"
    base: str | None  # of an adapter: the folder it goes on
    step: int
    parameters: int  # in the files
    dtype: str


def write_adapter(folder: Path, config: peft.LoraConfig, weights: Tensors) -> None:
    """Replace the folder by this adapter. Base parameters that were trained whole are no part of an adapter."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    # PEFT keeps names as its wrapper sees them, with the wrapper's own prefix.
    lora = {f"base_model.model.{name}": tensor for name, tensor in weights.items() if ".lora_" in name}
    save_file(lora, temporary / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(temporary))
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def export(context: RunContext, out: Path, merge: bool = False, dtype: str | None = None) -> tuple[Exported, "Probe"]:
    """Write the newest checkpoint that verifies to `out`, a folder that is not there or empty.

    Returns the export, and the question that check() asks it with this model's own answer. `dtype`: of the whole
    weights; default: that of the recipe's own weights, or float32. Raises UserError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: there is something already; name a new folder")
    engine, cursor = restore_engine(context)
    stage, model = context.recipe.stages[cursor.stage], engine.model
    if stage.lora is None and not merge:
        raise UserError(
            f"{context.run.path}: stage '{stage.name}' has no adapters to export; say --merge for the whole"
        )
    modules = tuple(getattr(build_family(context), "modules", ()))
    _check_class(model, modules)
    kept = dtype or _dtype_of(context)
    probe = Probe.of(build_encoder(context, cursor.stage), engine, context.recipe.precision)
    heads = module_table(model).pop("heads", None)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(mode=0o700, parents=True)
        base: str | None = None
        if merge:
            written = _write_whole(context, _merged(model), temporary, kept)
        else:
            assert stage.lora is not None
            weights = {name: tensor for name, tensor in engine.weights().items() if ".lora_" in name}
            whole = base_folder(context.recipe.model)
            also = any(".lora_" not in name and not name.startswith("heads.") for name in engine.trained)
            changed = also or whole is None or base_was_changed(context, cursor.stage)
            base = "base" if changed else whole
            config = adapters.peft_config(stage.lora)
            config.base_model_name_or_path = "base" if changed else Path(str(base)).name
            write_adapter(temporary / "adapter", config, weights)
            for file in (temporary / "adapter").iterdir():
                file.rename(temporary / file.name)
            (temporary / "adapter").rmdir()
            written = sum(tensor.numel() for tensor in weights.values())
            if changed:
                (temporary / "base").mkdir()
                written += _write_whole(context, _bare(model), temporary / "base", kept)
        _write_beside(context, build_encoder(context, cursor.stage), temporary)
        if heads is not None:
            kept_heads = {
                name: tensor.detach().float().cpu().contiguous() for name, tensor in heads.state_dict().items()
            }
            metadata = {"format": "pt", "findings": json.dumps(context.recipe.findings.names)}
            save_file(kept_heads, temporary / HEADS, metadata)
        exported = Exported(out, "model" if merge else "adapter", base, cursor.step, written, kept)
        (temporary / "README.md").write_text(card(context, cursor, exported.kind, base, kept), encoding="utf-8")
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return exported, probe


def base_was_changed(context: RunContext, stage: int) -> bool:
    """Return whether the model below the last adapters differs from the recipe's weights."""
    stages = context.recipe.stages[: stage + 1]
    return any(s.train for s in stages) or any(s.adapters == "merge" for s in stages)


def _dtype_of(context: RunContext) -> str:
    folder = base_folder(context.recipe.model)
    if folder is None:
        return "float32"
    config = json.loads((Path(folder) / "config.json").read_text())
    dtype = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("torch_dtype")
    return dtype if dtype in TOLERANCE else "float32"


def _bare(model: Any) -> Any:
    """Remove the adapters from the model, in place."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _merged(model: Any) -> Any:
    """Add the adapters to the weights, in place, by PEFT's own arithmetic."""
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            weight: Any = layer.get_base_layer().weight
            if not weight.is_floating_point():
                raise UserError(
                    f"--merge: {name} is quantised, and adding to it would round again; export the adapter, or merge "
                    "with a recipe that loads the weights as bf16"
                )
            layer.merge(safe_merge=True)
    return _bare(model)


def _write_whole(context: RunContext, model: Any, folder: Path, dtype: str) -> int:
    """Write config.json, the weights, and the model's modules that are not transformers' own."""
    settings = context.recipe.evaluation
    generation: Any = copy.deepcopy(model.generation_config)
    generation.max_new_tokens = settings.max_new_tokens
    model.generation_config = generation
    model.requires_grad_(False).to(getattr(torch, dtype))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    modules = getattr(build_family(context), "modules", ())
    # transformers renames tensors of its own classes alone, when it loads them.
    model.save_pretrained(str(folder), max_shard_size=SHARD, save_original_format=not modules)
    copy_modules(modules, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _check_class(model: Any, modules: Sequence[str]) -> None:
    """Raise UserError if plain transformers would not build this model: some of its weights would be lost."""
    kind = _exported_class(modules) or type(model)
    if not modules and not kind.__module__.startswith("transformers."):
        raise UserError(
            f"export: {kind.__name__} is no class of transformers, and has no module that can travel with it"
        )
    with torch.device("meta"):
        known = dict(kind(copy.deepcopy(model.config)).named_parameters())
    own = {adapters.canonical(name) for name, _ in model.named_parameters() if ".lora_" not in name}
    own = {name for name in own if not name.startswith("heads.")}
    if more := sorted(own - set(known)):
        raise UserError(
            f"export: {len(more)} of the model's tensors, '{more[0]}' first, have no place in transformers' "
            f"{kind.__name__}, and no module travels with it that has one"
        )


def _exported_class(modules: Sequence[str]) -> Any:
    """Return the class of the whole model in the exported modules; None if there is none."""
    for name in modules:
        module = importlib.import_module(name)
        if class_name := getattr(module, "AUTO_MAP", {}).get("AutoModelForImageTextToText"):
            return getattr(module, class_name)
    return None


def copy_modules(modules: Sequence[str], folder: Path) -> None:
    """Lay a family's own modules beside the weights, where transformers' `auto_map` finds them.

    Each is a file that imports neither radhpc nor its own package but, by relative imports, the others; if one does,
    an AssertionError names it. Its constant AUTO_MAP, if it has one, says which of its classes is which of
    transformers' Auto classes, such as {"AutoModelForImageTextToText": "Mine"}, and goes into config.json, or into
    processor_config.json where it is a processor's.
    """
    for module in modules:
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{module}: there is no such module"
        assert spec.origin is not None, f"{module}: no file holds it"
        used = sorted(set(_not_exported(module, modules)))
        assert not used, f"{module} does not stand alone beside the weights: it imports {', '.join(used)}"
        stem = module.rpartition(".")[2]
        (folder / f"{stem}.py").write_bytes(Path(spec.origin).read_bytes())
        if auto_map := getattr(importlib.import_module(module), "AUTO_MAP", {}):
            classes = {kind: f"{stem}.{name}" for kind, name in auto_map.items()}
            file = folder / ("processor_config.json" if "AutoProcessor" in classes else "config.json")
            config = json.loads(file.read_text())
            config["auto_map"] = config.get("auto_map", {}) | classes
            file.write_text(json.dumps(config, indent=2) + "\n")


def _not_exported(module: str, modules: Sequence[str]) -> Iterator[str]:
    """Yield what a module imports, anywhere in it, of radhpc and of its own package beyond the exported modules.

    Its compiled code is asked, as import statements inside functions run only later. Imports by a computed name are
    left to check(), which runs the export.
    """
    spec = importlib.util.find_spec(module)
    loader: Any = spec and spec.loader
    package, top = module.rpartition(".")[0], module.partition(".")[0]
    pending: list[CodeType] = [loader.get_code(module)]
    while pending:
        code = pending.pop()
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        for kind, details in ModuleFinder().scan_opcodes(code):
            if kind == "absolute_import":
                _, name = details
                if name.partition(".")[0] in {"radhpc", "shards", "slurm", top}:
                    yield name
            elif kind == "relative_import":
                level, names, name = details
                target = importlib.util.resolve_name("." * level + name, package)
                yield from {target, *(f"{target}.{n}" for n in names or () if not name)} - {package, *modules}


def _write_beside(context: RunContext, encoder: StudyEncoder, folder: Path) -> None:
    """Processor, tokenizer, how to ask, and the file that shows it."""
    family, weights = build_family(context), base_folder(context.recipe.model)
    family.tokenizer.save_pretrained(str(folder))  # before the processor, whose chat template is the one that counts
    if hasattr(family, "processor"):
        processor = family.processor()
        processor.save_pretrained(str(folder))
        if not type(processor).__module__.startswith("transformers."):
            copy_modules([type(processor).__module__], folder)
    elif weights is not None:
        from transformers import AutoProcessor

        AutoProcessor.from_pretrained(weights, local_files_only=True).save_pretrained(str(folder))  # type: ignore[no-untyped-call]
    else:
        raise UserError(
            f"export: family '{context.recipe.model.family}' has no processor that plain transformers reads"
        )
    images = getattr(family, "image_processor", None)
    shown = encoder.images
    asking = {
        "prompt": encoder.tasks.default_prompt(),
        "views": shown.limit,
        "stitch": shown.stitch,
        "gap": shown.gap,
        "square": images.background if isinstance(images, ClipImages) and images.fit == "pad" else None,
        "max_new_tokens": context.recipe.evaluation.max_new_tokens,
    }
    (folder / SETTINGS).write_text(json.dumps(asking, indent=2) + "\n", encoding="utf-8")
    (folder / "example.py").write_bytes((files("radhpc.serving.templates") / "example.py").read_bytes())


@dataclass(frozen=True)
class Probe:
    """A picture, and what the model of the run makes of it: the logits behind the prompt."""

    picture: Image.Image
    logits: torch.Tensor  # (vocabulary,) float32
    dtype: str  # of the computation

    @classmethod
    def of(cls, encoder: StudyEncoder, engine: Any, precision: str) -> "Probe":
        picture = probe_picture()
        encoder = copy.copy(encoder)
        encoder.retrieve = None  # whoever has no radhpc has no training studies to look up
        batch = encoder.batch([encoder.encode_prompt("", None, [picture])])
        inputs = {name: value for name, value in engine.to_device(batch).items() if name not in TARGET_KEYS}
        with torch.no_grad(), engine.autocast:
            logits = engine.model.eval()(**inputs).logits[0, -1].float().cpu()
        dtypes = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
        return cls(picture, logits, dtypes[precision])


def probe_picture() -> Image.Image:
    """A gray picture with large and small structures: nobody's radiograph."""
    y, x = np.mgrid[0:200, 0:160] / 40.0
    waves = np.sin(x) + np.cos(1.7 * y) + 0.3 * np.sin(5 * x * y)
    return Image.fromarray(np.uint8(np.rint(255 * (waves - waves.min()) / (waves.max() - waves.min()))))


def check(exported: Exported, probe: Probe) -> float:
    """Ask the exported folder in a process of its own that cannot import radhpc, by its example.py.

    Returns the largest difference of the logits, as a share of the largest logit. Raises UserError where that is more
    than the kind of number allows, or where plain transformers and peft cannot load what was written.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture, answer = Path(folder) / "picture.png", Path(folder) / "logits.safetensors"
        probe.picture.save(picture)
        arguments = [str(picture), "--logits", str(answer)]
        if exported.base not in (None, "base"):
            arguments += ["--base", str(exported.base)]
        done = subprocess.run(
            [sys.executable, "-I", str(_WITHOUT_RADHPC), str((exported.out / "example.py").absolute()), *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": folder},
        )
        if done.returncode:
            last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            raise UserError(f"{exported.out}: plain transformers and peft cannot load it: {last}")
        theirs = load_file(answer)["logits"]
    difference = float((theirs - probe.logits).abs().max() / probe.logits.abs().max())
    allowed = max(TOLERANCE[exported.dtype], TOLERANCE[probe.dtype])
    if not difference <= allowed:
        raise UserError(
            f"{exported.out}: its logits differ from the run's by {difference:.2g} of the largest one; "
            f"{exported.dtype} after {probe.dtype} allows {allowed:.2g}"
        )
    return difference
