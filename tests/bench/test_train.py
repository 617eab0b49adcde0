"""The measurements of training steps run, and print what programs rely on."""

import pytest

from tests.bench.test_stream import run_quick


@pytest.mark.heavy
@pytest.mark.timeout(280)
def test_steps_here_and_elsewhere() -> None:
    answer = run_quick("bench.train")
    others = ("bare loop, our layers", "bare loop, transformers' layers", "accelerate", "Trainer")
    ratios, figures = answer["ratios"], answer["figures"]
    assert all(0 < ratios[f"step, radhpc / {other}"] < 3 for other in others)
    assert figures["largest difference of a loss"] < 1e-3
    assert ratios["memory of the loss, chunked / plain"] < 0.5
    assert ratios["save, seconds that a step waits / until committed"] < 1
    assert figures["padding, length-aware batches"] < figures["padding, random batches"]


@pytest.mark.heavy
@pytest.mark.timeout(280)
def test_the_script_for_a_gpu_runs_without_one() -> None:
    answer = run_quick("bench.gpu", "--tiny")
    ratios, figures = answer["ratios"], answer["figures"]
    assert len(ratios) == 8
    assert all(value > 0 for value in ratios.values())
    assert ratios["4 tile(s), 24 tokens: memory, ours / plain sdpa"] < 0.9
    assert figures["1 tile(s), 24 tokens, ours, skipping: gigabytes"] < figures["1 tile(s), 24 tokens, ours: gigabytes"]
    assert 0 < figures["4 tile(s), 24 tokens, ours: MFU"] < 1
    assert all(value < 1e-4 for name, value in figures.items() if name.startswith("error of attention"))
