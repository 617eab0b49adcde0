"""Write a report of a radiograph with plain transformers, and peft where this folder holds an adapter.

    python example.py frontal.png [lateral.png ...] [--question "..."] [--base FOLDER]

Lies beside exported weights as example.py and needs nothing else than torch, transformers, peft and Pillow. Research
use only, not for clinical use. --base: the weights that an adapter goes on, where they are not in base/ beside it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

HERE = Path(__file__).resolve().parent
SETTINGS = "asking.json"  # the prompt, and how the views of a study are laid out


def load(base: str | None = None) -> tuple[Any, Any]:
    """Load the processor and the model of this folder."""
    own = has_code(HERE / "processor_config.json")
    # Code that it may run lies in this folder itself.
    processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        HERE, local_files_only=True, trust_remote_code=own
    )
    adapter = (HERE / "adapter_config.json").exists()
    weights = Path(base) if base else HERE / "base" if adapter else HERE
    own = has_code(weights / "config.json")
    model: Any = AutoModelForImageTextToText.from_pretrained(weights, local_files_only=True, trust_remote_code=own)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(HERE))
    return processor, model.eval()


def has_code(file: Path) -> bool:
    """Return whether a configuration names classes of files in its folder."""
    return file.exists() and "auto_map" in json.loads(file.read_text())


def pad(view: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Place the view in the middle of a square."""
    square = Image.new("RGB", (max(view.size), max(view.size)), colour)
    square.paste(view, ((square.width - view.width) // 2, (square.height - view.height) // 2))
    return square


def prepare(processor: Any, paths: list[str], question: str | None) -> Any:
    """Return the inputs of the model for one study."""
    settings = json.loads((HERE / SETTINGS).read_text())
    opened = [Image.open(path) for path in paths][: settings["views"]]
    views = [view if view.mode in ("L", "RGB") else view.convert("RGB") for view in opened]
    if settings["stitch"] and len(views) > 1:
        width = sum(view.width for view in views) + settings["gap"] * (len(views) - 1)
        joined = Image.new("RGB", (width, max(view.height for view in views)))
        left = 0
        for view in views:
            joined.paste(view, (left, 0))
            left += view.width + settings["gap"]
        views = [joined]
    if settings["square"]:  # padded with this colour, so that nothing is cut off
        views = [pad(view.convert("RGB"), tuple(settings["square"])) for view in views]
    content = [{"type": "image"} for _ in views] + [{"type": "text", "text": question or settings["prompt"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[views], text=[text], add_special_tokens=False, return_tensors="pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="the views of one study, 8 bits")
    parser.add_argument("--question", help="ask this instead of for a report")
    parser.add_argument("--base", help="the weights that an adapter goes on")
    parser.add_argument("--logits", help=argparse.SUPPRESS)  # write those behind the prompt to this file instead
    arguments = parser.parse_args()
    processor, model = load(arguments.base)
    inputs = prepare(processor, arguments.images, arguments.question)
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }
    with torch.no_grad():
        if arguments.logits:
            from safetensors.torch import save_file

            save_file({"logits": model(**inputs).logits[0, -1].float().cpu().contiguous()}, arguments.logits)
            return
        limit = json.loads((HERE / SETTINGS).read_text())["max_new_tokens"]
        ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    print(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
