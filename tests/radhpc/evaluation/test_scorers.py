"""Scorers with weights in local folders, on small weights of the right kind; AUROC and F1 are those of scikit-learn."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, classification_report, roc_auc_score
from transformers import BertConfig, BertModel, BertTokenizerFast, DistilBertConfig, DistilBertModel

from radhpc.core.errors import UserError
from radhpc.evaluation.metrics import answers, embeddings
from radhpc.evaluation.metrics.bootstrap import interval, value
from radhpc.evaluation.metrics.chexbert import CONDITIONS, FIVE, CheXbert, load
from radhpc.evaluation.metrics.scorers import KINDS, ModelScorers
from radhpc.evaluation.scoring import Row, Scoring, scores, trivial

pytestmark = pytest.mark.timeout(120)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "left", "right", "effusion", "##s", "heart", "normal", "."]
TEXTS = ["No left effusion.", "Heart normal.", "Right  effusions.\nHeart normal.", "effusion", "", "left left right"]
OTHERS = ["Left effusion.", "Heart normal.", "No effusion.", "heart", "normal", "right"]


@pytest.fixture(scope="module")
def chexbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of CheXbert's architecture, saved as its authors do: under DataParallel, in a dictionary."""
    folder = tmp_path_factory.mktemp("chexbert")
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    config.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(3)
    model = CheXbert(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.7)
    tensors = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model_state_dict": tensors, "epoch": 1}, folder / "chexbert.pth")
    return folder


def test_chexbert_reads_what_transformers_reads(chexbert: Path) -> None:
    """The network again, from transformers' BERT and tokenizer and the heads' matrices."""
    tensors = torch.load(chexbert / "chexbert.pth", weights_only=True)["model_state_dict"]
    bert = BertModel(BertConfig.from_pretrained(chexbert)).eval()
    bert.load_state_dict({k.removeprefix("module.bert."): v for k, v in tensors.items() if ".bert." in k})
    tokenizer = BertTokenizerFast(vocab_file=str(chexbert / "vocab.txt"), vocab={w: n for n, w in enumerate(WORDS)})
    wanted = []
    for text in TEXTS:
        with torch.no_grad():
            first = bert(**tokenizer(" ".join(text.split()), return_tensors="pt")).last_hidden_state[0, 0]
        names = [f"module.linear_heads.{n}" for n in range(14)]
        heads = [(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in names]
        wanted.append([int((weight @ first + bias).argmax()) for weight, bias in heads])
        assert len(heads[-1][1]) == 2
    scorer = load("chexbert", chexbert, "cpu")
    assert scorer.labels(TEXTS).tolist() == wanted
    assert len({tuple(row) for row in wanted}) > 3, "weights that say the same of every text"


def test_chexbert_f1_is_scikit_learns(chexbert: Path) -> None:
    scorer = load("chexbert", chexbert, "cpu")
    mine, wanted = (np.isin(scorer.labels(texts), (1, 3)).astype(int) for texts in (TEXTS, OTHERS))
    found = {name: value(measure.statistic) for name, measure in scorer.measures(TEXTS, OTHERS).items()}
    five = [CONDITIONS.index(name) for name in FIVE]
    for size, columns in ((14, list(range(14))), (5, five)):
        report = classification_report(wanted[:, columns], mine[:, columns], output_dict=True, zero_division=0)
        for average in ("micro", "macro"):
            assert found[f"chexbert/{average}_f1_{size}"] == pytest.approx(report[f"{average} avg"]["f1-score"])


def test_a_score_carries_the_sum_of_its_weights(chexbert: Path) -> None:
    import hashlib

    digest = hashlib.sha256((chexbert / "chexbert.pth").read_bytes()).hexdigest()
    scorers = ModelScorers({"chexbert": str(chexbert)}, {"chexbert": digest}, "cpu")
    measured = scorers.measures(TEXTS, OTHERS)
    assert set(measured) == set(KINDS["chexbert"].scores)
    assert {measure.weights for measure in measured.values()} == {digest}
    assert "chexbert" not in scorers.missing()
    assert "radgraph-xl/" in scorers.missing()["radgraph"]
    with pytest.raises(UserError, match=f"weights of sha256 {digest}; evaluation.scorers.sha256 wants 12"):
        ModelScorers({"chexbert": str(chexbert)}, {"chexbert": "12"}, "cpu").hashes  # noqa: B018


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code that came with the weights was run",)


@pytest.mark.parametrize("saved", [{"model_state_dict": {"a": torch.zeros(1)}}, Evil()])
def test_other_weights_are_refused_and_code_is_not_run(
    chexbert: Path, tmp_path: Path, saved: object, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("vocab.txt", "config.json"):
        (tmp_path / name).write_bytes((chexbert / name).read_bytes())
    torch.save(saved, tmp_path / "chexbert.pth")
    with pytest.raises(UserError, match="not CheXbert's weights") as caught:
        load("chexbert", tmp_path, "cpu")
    assert "\n" not in str(caught.value)
    assert "was run" not in capfd.readouterr().out


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distilbert")
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(WORDS), dim=32, n_layers=6, n_heads=2, hidden_dim=48)
    DistilBertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={w: n for n, w in enumerate(WORDS)}).save_pretrained(folder)
    return folder


def test_bertscore_by_its_definition(distilbert: Path) -> None:
    """Word by word, text by text, without batches; then rescaled."""
    tokenizer = BertTokenizerFast.from_pretrained(distilbert)
    model = DistilBertModel.from_pretrained(distilbert).eval()

    def vectors(text: str) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**{k: v for k, v in tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"},
                           output_hidden_states=True).hidden_states[5][0]  # fmt: skip
        return torch.nn.functional.normalize(hidden, dim=-1)

    wanted = []
    for mine, other in zip(TEXTS, OTHERS, strict=True):
        left, right = vectors(mine), vectors(other)
        if min(len(left), len(right)) <= 2:
            wanted.append((0.0, 0.0, 0.0))
            continue
        precision = np.mean([max(float(a @ b) for b in right) for a in left[1:-1]])
        recall = np.mean([max(float(a @ b) for a in left) for b in right[1:-1]])
        wanted.append((precision, recall, 2 * precision * recall / (precision + recall)))
    scorer = embeddings.load("bertscore", distilbert, "cpu")
    (measure,) = scorer.measures(TEXTS, OTHERS).values()
    assert "not rescaled" in measure.convention
    assert value(measure.statistic) == pytest.approx(np.mean([f1 for _, _, f1 in wanted]), abs=1e-5)
    with open(distilbert / "baseline.tsv", "w", newline="") as file:
        csv.writer(file).writerows([("LAYER", "P", "R", "F"), *((n, 0.1, 0.2, 0.3 + n / 100) for n in range(7))])
    rescaled = value(embeddings.load("bertscore", distilbert, "cpu").measures(TEXTS, OTHERS)["bertscore/f1"].statistic)
    assert rescaled == pytest.approx(np.mean([(f1 - 0.35) / 0.65 for _, _, f1 in wanted]), abs=1e-5)


def test_the_cosine_of_equal_texts_is_one(distilbert: Path) -> None:
    scorer = embeddings.load("clinicalbert", distilbert, "cpu")
    assert value(scorer.measures(TEXTS, TEXTS)["clinicalbert/cosine"].statistic) == pytest.approx(1, abs=1e-5)
    assert value(scorer.measures(TEXTS, OTHERS)["clinicalbert/cosine"].statistic) < 0.999


@pytest.mark.parametrize("seed", range(4))
def test_curves_are_scikit_learns(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, 60).astype(float)
    probabilities = np.round(random.random(60), 1 if seed % 2 else 6)  # with ties, and without
    truth[:5] = np.nan
    known = np.isfinite(truth)
    weights = random.integers(0, 4, (3, 60)).astype(float)
    weights[:, :5] = 1
    for ours, theirs in ((answers.auroc, roc_auc_score), (answers.auprc, average_precision_score)):
        found = ours(probabilities, truth).at(weights)
        wanted = [theirs(truth[known], probabilities[known], sample_weight=row[known]) for row in weights]
        assert found == pytest.approx(wanted, abs=1e-9)
    assert np.isnan(value(answers.auroc(probabilities, np.ones(60))))
    limits = interval(answers.auroc(probabilities, truth), [str(n // 3) for n in range(60)], replicates=100)
    assert limits is not None
    assert limits[0] < limits[1]


def row(n: int, question: str | None, reference: str, generated: str, **more: object) -> Row:
    given = {"labels": {}, **more}
    return Row(f"k{n}", f"p{n}", f"s{n}", "set", question, reference, generated, **given)  # type: ignore[arg-type]


def test_questions_are_scored_open_and_closed_apart() -> None:
    from radhpc.core.recipe import EvaluationSettings

    rows = [
        row(0, "Is there an effusion?", "Yes", "yes."),
        row(1, "Is there a mass?", "no", "yes"),
        row(2, "Where?", "left lower lobe", "lower lobe"),
        row(3, "Which side?", "left", "left", labels={"answer type": {"closed": 1}}),
        row(4, None, "A report.", "A report."),
    ]
    found = scores(Scoring(EvaluationSettings()).measures(rows), rows)
    assert found["vqa/exact_match"]["value"] == pytest.approx(2 / 4)
    assert found["vqa/closed_exact_match"]["value"] == pytest.approx(2 / 3)
    assert found["vqa/open_exact_match"]["value"] == 0
    assert found["vqa/open_token_f1"]["value"] == pytest.approx(0.8)
    assert found["vqa/closed_exact_match"]["convention"].startswith("share of equal answers; 3 closed questions")
    assert found["radeval_raw/bleu_1"]["value"] == pytest.approx(1), "questions are no reports"


def test_likelihoods_give_curves_and_their_mean() -> None:
    from radhpc.core.recipe import EvaluationSettings

    random = np.random.default_rng(0)
    rows = []
    for n in range(40):
        there = int(random.integers(2))
        labels = {"chexpert": {"Edema": there, "Fracture": [0, -1, None, 1][n % 4], "Pneumonia": 0}}
        yes = {"Edema": 0.5 + (there - 0.5) * float(random.random()), "Fracture": n / 40, "Pneumonia": 0.1}
        rows.append(row(n, None, "A", "A", labels=labels, likelihoods=yes))
    found = scores(Scoring(EvaluationSettings()).measures(rows), rows)
    assert found["auroc/Edema"]["value"] == 1
    truth = [float(r.labels["chexpert"]["Fracture"] or 0) for r in rows]
    known = [n for n in range(40) if truth[n] >= 0]
    wanted = roc_auc_score([truth[n] for n in known], [n / 40 for n in known])
    assert found["auroc/Fracture"]["value"] == pytest.approx(wanted)
    assert found["auroc/macro"]["value"] == pytest.approx((1 + wanted) / 2)
    assert "auroc/Pneumonia" not in found, "without one that has it there is no curve"


def test_trivial_answers() -> None:
    known = [(None, "Normal."), (None, "Normal."), (None, "Effusion.")]
    known += [("Is it?", "yes"), ("is it? ", "yes"), ("Who?", "me")]
    rows = [row(0, None, "", ""), row(1, "Is it?", "", ""), row(2, "Never asked", "", "")]
    found = trivial(rows, known)
    assert found["constant"] == ["Normal.", "yes", "yes"]
    assert found["random"][0] in ("Normal.", "Effusion.")
    assert found["random"][1] in ("yes", "me")
    assert trivial(rows, []) == {"constant": ["", "", ""], "random": ["", "", ""]}
