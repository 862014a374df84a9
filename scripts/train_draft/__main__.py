"""``python scripts/train_draft --help``"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # in place of this directory, whose modules are a package's

from train_draft.cli import main  # noqa: E402

main()
