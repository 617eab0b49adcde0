"""CheXbert (Smit et al., EMNLP 2020): labels fourteen observations of a report, and scores F1 between two reports.

    scorer = load("chexbert", Path("/weights/chexbert"), "cpu")
    scorer.labels(["Small left effusion."])                     # (1, 14): 0 unsaid, 1 present, 2 absent, 3 uncertain

It has its own loader, because the published packages run on no current transformers. The network is BERT with fourteen
linear heads over the first token: thirteen of four classes, and No Finding of two. The folder holds chexbert.pth,
vocab.txt of bert-base-uncased and, for another BERT than the base one, its config.json.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel

from radhpc.core.errors import UserError, first_line
from radhpc.evaluation.metrics.answers import label_counts, label_f1
from radhpc.evaluation.metrics.conventions import Measure

# The order of its heads, which is not that of CheXpert's tables.
CONDITIONS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
FIVE = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")
_CLASSES = (*(4 for _ in CONDITIONS[:-1]), 2)
_LONGEST = 512
_BATCH = 32


class CheXbert(nn.Module):
    """The network."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = BertModel(config)
        self.linear_heads = nn.ModuleList(nn.Linear(config.hidden_size, classes) for classes in _CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, length) twice -> the likeliest class of each observation, (batch, 14)."""
        first = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        return torch.stack([head(first).argmax(1) for head in self.linear_heads], 1)


class CheXbertScorer:
    """CheXbert with its tokenizer. Labels are cached by text, because every baseline has the same references."""

    def __init__(self, model: CheXbert, tokenizer: Tokenizer, device: str) -> None:
        self.model, self.tokenizer, self.device = model.eval().to(device), tokenizer, device
        self._known: dict[str, npt.NDArray[np.int64]] = {}

    @torch.no_grad()
    def labels(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """(texts, 14), in the order of CONDITIONS: 0 unsaid, 1 present, 2 absent, 3 uncertain."""
        new = sorted({text for text in texts if text not in self._known}, key=len)
        for start in range(0, len(new), _BATCH):
            some = new[start : start + _BATCH]
            encoded = self.tokenizer.encode_batch([re.sub(r"\s+", " ", text).strip() for text in some])
            ids, mask = (torch.tensor([getattr(row, key) for row in encoded]) for key in ("ids", "attention_mask"))
            classes = self.model(ids.to(self.device), mask.to(self.device)).cpu().numpy()
            self._known.update(zip(some, classes, strict=True))
        return np.stack([self._known[text] for text in texts])

    def measures(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
        """Compute F1 as RRG24 does: present and uncertain against the rest; macro counts an absent class as zero."""
        predicted, expected = (_positive(self.labels(texts)) for texts in (generated, references))
        counts = {14: label_counts(predicted, expected, CONDITIONS), 5: label_counts(predicted, expected, FIVE)}
        about = "CheXbert on both texts, present and uncertain against unsaid and absent"
        return {
            f"chexbert/{average}_f1_{size}": Measure(
                label_f1(each, "all" if average == "macro" else average),
                f"{average} F1 of {size}; {about}",
            )
            for size, each in counts.items()
            for average in ("micro", "macro")
        }


def _positive(labels: npt.NDArray[np.int64]) -> list[set[str]]:
    return [{name for name, value in zip(CONDITIONS, row, strict=True) if value in (1, 3)} for row in labels]


def load(name: str, folder: Path, device: str) -> CheXbertScorer:
    """Read the weights; only tensors, never code. Raises UserError where they are not CheXbert's."""
    path = folder / "chexbert.pth"
    config = BertConfig.from_pretrained(folder) if (folder / "config.json").exists() else BertConfig()
    model = CheXbert(config)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        tensors: Mapping[str, torch.Tensor] = saved.get("model_state_dict", saved)
        plain = {key.removeprefix("module."): value for key, value in tensors.items()}
        plain.pop("bert.embeddings.position_ids", None)  # older versions of transformers saved what is a constant
        model.load_state_dict(plain)
    except Exception as error:  # torch raises several kinds for files that are no weights, or other ones
        raise UserError(f"evaluation.scorers.{name}: {path}: not CheXbert's weights: {first_line(error)}") from error
    return CheXbertScorer(model, _tokenizer(folder / "vocab.txt"), device)


@functools.cache
def _tokenizer(vocabulary: Path) -> Tokenizer:
    """Build bert-base-uncased's tokenizer from its vocab.txt."""
    ids = {word: n for n, word in enumerate(vocabulary.read_text(encoding="utf-8").splitlines())}
    if missing := [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if token not in ids]:
        raise UserError(f"{vocabulary}: no {', '.join(missing)} there; it is not a vocabulary of BERT")
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding(pad_id=ids["[PAD]"], pad_token="[PAD]")
    return tokenizer
