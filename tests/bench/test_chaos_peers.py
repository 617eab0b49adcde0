"""What bench/chaos_peers.py reads from the files of a peer's ranks; its measurement is a command of minutes."""

import json
from pathlib import Path

from bench.chaos_peers import Script


def test_a_step_made_twice_counts_once_and_is_told(tmp_path: Path) -> None:
    for rank in (0, 1):
        rows = [(1, f"a{rank}", 9.0), (2, f"b{rank}", 8.0), (2, f"c{rank}", 7.0 + rank), (3, f"d{rank}", 6.0)]
        lines = [json.dumps({"step": step, "keys": [key], "loss": loss}) for step, key, loss in rows]
        (tmp_path / f"steps.rank-{rank}.jsonl").write_text("\n".join([*lines, '{"step": 4, "ke']))  # killed as it wrote
    peer = Script(tmp_path, "", 3)
    assert peer.made(tmp_path) == {1: ["a0", "a1"], 2: ["c0", "c1"], 3: ["d0", "d1"]}
    assert peer.again(tmp_path) == 1
    assert peer.losses(tmp_path) == {1: 9.0, 2: 7.0, 3: 6.0}
    assert not peer.made(tmp_path / "not begun")
