"""Define the section `evaluation`: what is generated for held-out studies, and how it is scored."""

from typing import Any, Literal

from pydantic import Field, model_validator

from radhpc.core.recipe.paths import absolute
from radhpc.core.recipe.section import Section
from radhpc.core.sample import Split


class ScorerSettings(Section):
    """Models that judge reports, from folders on this machine; a score without its weights is left out, and says so.

    {sha256: ...} holds what the weights must be: the sum over the folder's weight files, as scores.json gives it.
    """

    chexbert: str | None = Field(None, description="chexbert.pth, and vocab.txt of bert-base-uncased")
    bertscore: str | None = Field(
        None, description="distilbert-base-uncased as transformers saves it, baseline.tsv too"
    )
    clinicalbert: str | None = Field(None, description="Bio_ClinicalBERT as transformers saves it")
    radgraph: str | None = Field(None, description="radgraph-xl/ and hub/, for the package radeval")
    radcliq: str | None = Field(None, description="hub/ with its three models, for the package radeval")
    ratescore: str | None = Field(None, description="hub/ with its two models, for the package radeval")
    green: str | None = Field(None, description="GREEN-radllama2-7b, for the package radeval")
    sha256: dict[str, str] = Field(default_factory=dict, description="by name: what the weights must be")

    @model_validator(mode="after")
    def _hashes_of_folders(self) -> "ScorerSettings":
        for name in self.sha256:
            if name not in self.folders():
                raise ValueError(f"sha256.{name}: allowed are those that have a folder: {', '.join(self.folders())}")
        return self

    def folders(self) -> dict[str, str]:
        """Return the folders by name, as absolute paths."""
        names = [name for name in type(self).model_fields if name != "sha256"]
        return {name: absolute(folder) for name in names if (folder := getattr(self, name)) is not None}


Conventions = Literal[
    "r2gen_iu", "r2gen_mimic", "r2gengpt", "coco_ptb", "radeval_raw", "sacrebleu_13a", "sacrebleu_13a_lower"
]


class EvaluationSettings(Section):
    """Generation on held-out studies, at the end of each stage and every so many steps."""

    every: int | None = Field(None, ge=1, description="steps; default: at the end of a stage alone")
    split: Split = Field("validate", description="the split whose studies are generated for and scored")
    samples: int | None = Field(64, ge=1, description="of the split, always the same ones; null: all")
    batch: int = Field(16, ge=1, description="studies per rank and generation")
    max_new_tokens: int = Field(128, ge=1, description="longest generated text, in tokens")
    min_new_tokens: int = Field(0, ge=0, description="shortest generated text, in tokens")
    beams: int = Field(1, ge=1, description="texts that are searched at a time; 1: the likeliest next word")
    temperature: float | None = Field(None, gt=0, description="sample instead, from the distribution at this one")
    top_p: float | None = Field(None, gt=0, le=1, description="sample among the likeliest words of this share")
    repetition_penalty: float | None = Field(None, gt=0, description="above 1: words that are there already, less")
    length_penalty: float | None = Field(None, description="of beams; above 0: longer texts, more")
    cache: Literal["dynamic", "static"] = Field(
        "dynamic", description="keys and values of generation; static: one shape throughout, for compiled models"
    )
    conventions: tuple[Conventions, ...] = Field(
        ("r2gen_mimic", "radeval_raw"), description="how texts are compared while training; 'evaluate' uses all"
    )
    findings_question: str | None = Field(
        None, description="such as 'Is there {finding}? Answer yes or no.': AUROC from the likelihoods of yes and no"
    )
    findings_vocabulary: str = Field("chexpert", description="which of a sample's labels findings_question asks for")
    neighbours: int = Field(
        1024, ge=0, description="training studies among which the nearest one by its image is a baseline; 0: none"
    )
    scorers: ScorerSettings = ScorerSettings()  # type: ignore[call-arg]
    images: int = Field(4, ge=0, description="studies shown in TensorBoard with reference and generated report")

    @model_validator(mode="after")
    def _decoding(self) -> "EvaluationSettings":
        if self.temperature is not None and self.beams > 1:
            raise ValueError(f"'temperature' {self.temperature:g} samples one text; it does not go with 'beams'")
        if self.top_p is not None and self.temperature is None:
            raise ValueError(f"'top_p' {self.top_p:g} goes with 'temperature', which samples")
        if self.length_penalty is not None and self.beams == 1:
            raise ValueError(f"'length_penalty' {self.length_penalty:g} goes with 'beams' above 1")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"'min_new_tokens' {self.min_new_tokens} is above 'max_new_tokens' {self.max_new_tokens}")
        if self.cache == "static" and self.beams > 1:
            raise ValueError("'cache: static' does not go with 'beams'")
        if self.findings_question is not None and "{finding}" not in self.findings_question:
            raise ValueError("'findings_question' must name {finding}")
        return self

    def decoding(self) -> dict[str, Any]:
        """Return the arguments of transformers' generate() that decide how words are chosen."""
        names = ("temperature", "top_p", "repetition_penalty", "length_penalty")
        arguments: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        arguments |= {"num_beams": self.beams, "do_sample": self.temperature is not None}
        arguments |= {"min_new_tokens": self.min_new_tokens} if self.min_new_tokens else {}
        return arguments | ({"cache_implementation": "static"} if self.cache == "static" else {})
