"""Training speed on one GPU: images and tokens per second, MFU and memory, ours beside what a user would write.

    python -m bench.gpu [--json] [--quick] [--tiny]

On a GPU: Llama-3.2-11B-Vision from its configuration with random weights, LoRA of rank 16 on all linear layers of text
and vision, one and four tiles, 256 and 512 text tokens, in bf16 with gradient checkpointing; our engine, and the loop
of transformers and PEFT with sdpa and with eager attention. Then recipes with a 4-bit base inside the memory of a T4
and of an RTX 3090, and every attention kernel against float64. Without a GPU, or with --tiny: the quickstart's model
in float32, so that the script is known to run.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration

from bench import report
from radhpc.core.recipe import LoraSettings, Recipe, load
from radhpc.data.collate import IGNORE, Batch
from radhpc.distributed.ranks import Ranks
from radhpc.engine.flop_counter import PEAKS
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters, attention
from radhpc.models.attention import Segment
from radhpc.models.families import mllama_attention, mllama_tiles
from radhpc.models.families.mllama import MllamaFamily
from radhpc.models.quantization import quantise
from radhpc.planning.memory_trace import MemoryTrace

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
CAPS = {"T4": 15e9, "RTX 3090": 23e9}  # bytes that a 4-bit recipe may take
TARGETS = r".*(language_model|vision_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2)"
NOTES = """\
plain: transformers and PEFT, gradient_checkpointing_enable(), labels given to the model, AdamW; same batch, adapters.
MFU: floating-point operations that the model needs (see operations(), nothing recomputed counts) over the chip's peak.
tokens: text tokens. Tile counts: upstream computes four tiles for each image; 'skipping' computes those it fills.
memory: the allocator's peak on a GPU, live tensors on a CPU. Kernels: largest error over the largest value, in the
type of the training; 'math' is what rounding alone makes of it."""


@dataclass(frozen=True)
class Case:
    """What a batch is like."""

    tiles: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.tiles} tile(s), {self.tokens} tokens"


class Setting:
    """The model and the machine."""

    def __init__(self, tiny: bool, quick: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tiny = tiny or self.device.type == "cpu"
        self.precision = "fp32" if self.tiny else "bf16"
        self.dtype = torch.float32 if self.tiny else torch.bfloat16
        self.rows = 2 if self.tiny else 4
        self.warm, self.steps = (1, 2) if quick or self.tiny else (3, 8)
        lengths = (24, 48) if self.tiny else (256, 512)
        self.cases = [Case(tiles, tokens) for tiles in (1, 4) for tokens in (lengths[:1] if quick else lengths)]
        self.config = self._config()

    def _config(self) -> MllamaConfig:
        if not self.tiny:
            return MllamaConfig(vision_config={"image_size": 560})
        given = load(RECIPE).model.config
        assert given is not None
        vision = dict(given["vision"], max_num_tiles=4)
        vision.pop("supported_aspect_ratios")
        text = dict(given["text"], vocab_size=600, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        return MllamaConfig(text_config=text, vision_config=vision, image_token_index=600)

    def model(self, implementation: str, skip: bool = False) -> Any:
        """Random weights, made where and as they are needed; the gates are open, so that images count."""
        self.config._attn_implementation = implementation
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = MllamaForConditionalGeneration(self.config)
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("attn_gate", "mlp_gate", ".gate", "gate_attn", "gate_ffn")):
                    parameter.fill_(0.5)
        mllama_attention.attach(model)
        if skip:
            mllama_tiles.attach(model)
        return model

    def batch(self, case: Case) -> Batch:
        """On the CPU, as the stream gives it: one image a text, the second half of the text supervised."""
        rng = np.random.default_rng(0)
        vision = self.config.vision_config
        ids = rng.integers(3, self.config.text_config.vocab_size, (self.rows, case.tokens))
        ids[:, 1] = self.config.image_token_index
        labels = ids.copy()
        labels[:, : case.tokens // 2] = IGNORE
        tiles = np.zeros((self.rows, 1, vision.max_num_tiles), np.int64)
        tiles[..., : case.tiles] = 1
        cross = np.broadcast_to(tiles[:, None], (self.rows, case.tokens, 1, vision.max_num_tiles)).copy()
        cross[:, 0] = 0
        side = vision.image_size
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(self.rows, case.tokens, dtype=torch.long),
            "labels": torch.from_numpy(labels),
            "pixel_values": torch.randn(
                self.rows, 1, vision.max_num_tiles, 3, side, side, generator=torch.Generator().manual_seed(0)
            ).to(self.dtype),
            "aspect_ratio_ids": torch.full((self.rows, 1), 1 if case.tiles == 1 else 6),
            "aspect_ratio_mask": torch.from_numpy(tiles),
            "cross_attention_mask": torch.from_numpy(cross),
        }

    def recipe(self, *more: str) -> Recipe:
        return load(
            RECIPE, [f"precision={self.precision}", "model.checkpoint_activations=true", "engine=single", *more]
        )


def ours(
    setting: Setting, skip: bool = False, more: tuple[str, ...] = (), targets: str = TARGETS
) -> Callable[[Batch], None]:
    """A step of our engine."""
    model, recipe = setting.model(attention.NAME, skip), setting.recipe(*more)
    if recipe.model.quantise is not None:
        quantise(model, MllamaFamily.blocks, ())
    adapters.attach(model, LoraSettings(rank=16, alpha=16, targets=targets), 0)
    adapters.choose_trained(model, recipe.stages[1].model_copy(update={"train": ()}))
    engine = Engine(model, recipe, recipe.stages[1].optimizer, MllamaFamily.blocks, Ranks())

    def step(batch: Batch) -> None:
        engine.step([batch], int((batch["labels"][:, 1:] != IGNORE).sum()), 1.0)

    return step


def plain(setting: Setting, implementation: str) -> Callable[[Batch], None]:
    """A step as one writes it with transformers and PEFT."""
    model: Any = peft.get_peft_model(
        setting.model(implementation), peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS)
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-4)

    def step(batch: Batch) -> None:
        inputs = {name: value.to(setting.device) for name, value in batch.items()}
        model(**inputs, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def operations(setting: Setting, case: Case) -> dict[str, float]:
    """Floating-point operations that one step needs, in the frozen and in the trained part.

    A linear layer of p weights over n positions multiplies and adds 2 p n times forward, and again to pass its gradient
    on; a trained one once more for its own gradient. So a frozen weight costs 4 p n, a weight of an adapter 6 p n.
    Attention of d hidden values over q queries and k keys takes 4 q k d forward (scores, then values) and twice that
    backward: 12 q k d, half of it where it is causal; it has no weights and counts as frozen. The output head works on
    supervised positions alone. Not counted: norms, embeddings, and what checkpointing computes again (as Chowdhery et
    al., 2022, PaLM, count MFU). Vision has T tiles of L positions, padded to a multiple of eight as upstream has it.
    """
    text, vision = setting.config.text_config, setting.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    seen = vision.max_num_tiles * (patches + (8 - patches % 8) % 8)
    image_tokens, supervised = vision.max_num_tiles * patches, case.tokens - case.tokens // 2
    head_size = text.hidden_size // text.num_attention_heads
    keys = 2 * text.num_key_value_heads * head_size
    layers, crossing = text.num_hidden_layers, len(text.cross_attention_layers)
    d, inner, vd, vinner = text.hidden_size, text.intermediate_size, vision.hidden_size, vision.intermediate_size
    towers = vision.num_hidden_layers + vision.num_global_layers
    frozen = trained = 0.0
    linear: list[tuple[int, int, int, int, bool]] = [  # layers, in, out, positions, adapted
        (layers, d, d, case.tokens, True), (layers, d, d, case.tokens, True),  # q and o
        (layers - crossing, d, keys // 2, case.tokens, True), (layers - crossing, d, keys // 2, case.tokens, True),
        (crossing, d, keys // 2, image_tokens, True), (crossing, d, keys // 2, image_tokens, True),
        (layers, d, inner, case.tokens, True), (layers, d, inner, case.tokens, True),
        (layers, inner, d, case.tokens, True),
        (1, d, text.vocab_size, supervised, False),
        (towers, vd, vd, seen, True), (towers, vd, vd, seen, True), (towers, vd, vd, seen, True),
        (towers, vd, vd, seen, True), (towers, vd, vinner, seen, True), (towers, vinner, vd, seen, True),
        (1, vision.vision_output_dim, d, image_tokens, False),
    ]  # fmt: skip
    for count, wide, high, positions, adapted in linear:
        frozen += 4.0 * count * wide * high * positions
        trained += 6.0 * count * 16 * (wide + high) * positions if adapted else 0
    frozen += 12.0 * towers * seen * seen * vd
    frozen += 12.0 * (layers - crossing) * case.tokens * case.tokens / 2 * d
    frozen += 12.0 * crossing * case.tokens * image_tokens * d
    return {"frozen": frozen * setting.rows, "trained": trained * setting.rows}


def peak_operations(setting: Setting) -> float:
    """Of the chip in the training's type, per second; of one that nobody listed, what a large product reaches."""
    if setting.device.type == "cuda":
        name = torch.cuda.get_device_name(setting.device)
        for known, peak in PEAKS:
            if all(word in name for word in known.split()):
                return peak
    size = 8192 if setting.device.type == "cuda" else 512
    square = torch.randn(size, size, dtype=setting.dtype, device=setting.device)
    seconds = min(_timed(setting, lambda: square @ square) for _ in range(8))
    return 2.0 * size**3 / seconds


def _timed(setting: Setting, call: Callable[[], object]) -> float:
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if setting.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def memory(setting: Setting) -> Iterator[Callable[[], float]]:
    """The peak of bytes since the beginning."""
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield lambda: float(torch.cuda.max_memory_allocated())
    else:
        with MemoryTrace() as held:
            yield lambda: float(held.peak)


def programs(setting: Setting) -> dict[str, Callable[[], Callable[[Batch], None]]]:
    """By name: what builds a program, and gives its step."""
    return {
        "ours": lambda: ours(setting),
        "ours, skipping": lambda: ours(setting, skip=True),
        "plain sdpa": lambda: plain(setting, "sdpa"),
        "plain eager": lambda: plain(setting, "eager"),
    }


def speed(setting: Setting) -> tuple[dict[str, float], dict[str, float]]:
    """Each program over each case; one that does not fit has no row."""
    peak = peak_operations(setting)
    figures: dict[str, float] = {"peak teraflops of the chip": peak / 1e12}
    found: dict[tuple[str, Case], tuple[float, float]] = {}
    for name, build in programs(setting).items():
        fitting: dict[Case, float] = {}
        with memory(setting) as used:  # which on a CPU slows what it counts
            step = build()
            weights = used()
            for case in setting.cases:
                if setting.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                try:
                    for _ in range(setting.warm):
                        step(setting.batch(case))
                    fitting[case] = max(weights, used())
                except torch.OutOfMemoryError:
                    figures[f"{case}, {name}: out of memory"] = 1.0
        for case, bytes_used in fitting.items():
            batch = setting.batch(case)
            seconds = min(_timed(setting, partial(step, batch)) for _ in range(setting.steps))
            found[name, case] = (seconds, bytes_used)
        del step
    for (name, case), (seconds, used_bytes) in found.items():
        needed = operations(setting, case)
        figures |= {
            f"{case}, {name}: images/s": setting.rows / seconds,
            f"{case}, {name}: tokens/s": setting.rows * case.tokens / seconds,
            f"{case}, {name}: MFU": sum(needed.values()) / seconds / peak,
            f"{case}, {name}: of it in trained weights": needed["trained"] / sum(needed.values()),
            f"{case}, {name}: gigabytes": used_bytes / 1e9,
        }
    ratios = {}
    for case in setting.cases:
        for other in ("plain sdpa", "plain eager"):
            if ("ours", case) in found and (other, case) in found:
                here, there = found["ours", case], found[other, case]
                ratios[f"{case}: images/s, ours / {other}"] = there[0] / here[0]
                ratios[f"{case}: memory, ours / {other}"] = here[1] / there[1]
    return ratios, figures


def capped(setting: Setting) -> dict[str, float]:
    """Whether a 4-bit base with adapters trains inside a smaller card's memory: gigabytes used, 0 where it does not."""
    if setting.device.type == "cpu":
        return {}
    figures = {}
    total = torch.cuda.get_device_properties(setting.device).total_memory
    for card, cap in CAPS.items():
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
        case = Case(4, setting.cases[0].tokens)
        try:
            with memory(setting) as used:
                precision = "fp16" if card == "T4" else "bf16"  # a T4 has no bf16
                step = ours(setting, more=("model.quantise=nf4", f"precision={precision}"))
                batch = {name: value[:1] for name, value in setting.batch(case).items()}
                for _ in range(2):
                    step(batch)
                figures[f"NF4 inside {cap / 1e9:.0f} GB ({card}): gigabytes"] = used() / 1e9
                del step
        except torch.OutOfMemoryError:
            figures[f"NF4 inside {cap / 1e9:.0f} GB ({card}): gigabytes"] = 0.0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return figures


def kernels(setting: Setting) -> dict[str, float]:
    """Each kernel's largest error, forward and backward, against float64, over segments as a batch has them."""
    torch.manual_seed(0)
    config = setting.config.text_config
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, 64 if setting.tiny else 128
    rows, length = 2, 96 if setting.tiny else 640
    lengths = [length, length // 3]
    q, k, v = (
        torch.randn(rows, count, length, size, device=setting.device, dtype=setting.dtype)
        for count in (heads, groups, groups)
    )
    outward = torch.randn(rows, length, heads, size, device=setting.device, dtype=setting.dtype)
    figures = {}
    for causal in (True, False):
        parts = [np.arange(row * length + length - n, (row + 1) * length) for row, n in enumerate(lengths)]
        shape = (rows, length, length)
        packed = attention.Segments([Segment(part, part) for part in parts], shape, setting.device, causal).packed
        seen = torch.zeros(rows, length, dtype=torch.bool, device=setting.device)
        for row, n in enumerate(lengths):
            seen[row, length - n :] = True

        def run(
            call: Any, dtype: torch.dtype, packed: Any = packed, causal: bool = causal, seen: Any = seen
        ) -> list[torch.Tensor]:
            leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
            tokens = [leaf.transpose(1, 2).flatten(0, 1).index_select(0, packed.queries) for leaf in leaves]
            found = call(*tokens, packed, attention.Options(size**-0.5, causal=causal))
            found.backward(outward[seen].to(dtype))
            return [found.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

        exact = run(attention.sdpa_by_length, torch.float64)

        def error(found: list[torch.Tensor], exact: list[torch.Tensor] = exact) -> float:
            return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))

        kind = "causal" if causal else "whole"
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            figures[f"error of attention, {kind}, math"] = error(run(attention.sdpa_by_length, setting.dtype))
        for kernel in attention.usable_kernels(setting.device, setting.dtype, size, dropout=False):
            figures[f"error of attention, {kind}, {kernel.name}"] = error(run(kernel.call, setting.dtype))
    return figures


def main() -> None:
    parser = report.parser("gpu", __doc__, "fewer steps and one length of text")
    parser.add_argument("--tiny", action="store_true", help="the quickstart's model, also on a GPU")
    arguments = parser.parse_args()
    setting = Setting(arguments.tiny, arguments.quick)
    ratios, figures = speed(setting)
    figures |= capped(setting) | kernels(setting)
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "no GPU"
    model = "the quickstart's model" if setting.tiny else "Llama-3.2-11B-Vision, random weights"
    report.show(f"{model} on {name}", ratios, figures, NOTES, arguments.json)


if __name__ == "__main__":
    report.run(main)
