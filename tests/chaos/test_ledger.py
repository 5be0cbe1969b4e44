"""What processes wrote down is read back, whatever became of them."""

import os
from pathlib import Path

from tests.chaos.ledger import Ledger, read_ledger


def test_a_ledger_survives_its_process_up_to_the_last_whole_line(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path, "learner-1"), Ledger(tmp_path, "actor-1")
    first.write("claimed", fence=1)
    second.write("leased", index=0)
    first.write("used", step=1)
    with (tmp_path / "actor-1.ledger").open("ab") as torn:
        torn.write(b'[1, "actor-1", "lea')
    entries = read_ledger(tmp_path)
    assert [(e.who, e.what, dict(e.fields)) for e in entries] == [
        ("learner-1", "claimed", {"fence": 1}),
        ("actor-1", "leased", {"index": 0}),
        ("learner-1", "used", {"step": 1}),
    ]
    assert os.stat(tmp_path / "learner-1.ledger").st_mode & 0o777 == 0o644
