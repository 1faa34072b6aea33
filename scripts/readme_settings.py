"""Write the table of settings into README.md, from the strings under the fields of `EngineConfig`.

With --check nothing is written: the exit status is 1 where the page differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from manylora import settings_table

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- settings: scripts/readme_settings.py -->\n", "<!-- end of settings -->\n"


def with_table(page: str) -> str:
    """The page with the table as it should be, between its two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no place for the settings: {BEGIN!r} and {END!r}")
    return f"{before}{begin}{settings_table.markdown()}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where it differs")
    arguments = parser.parse_args()
    page = README.read_text(encoding="utf-8")
    wanted = with_table(page)
    if page == wanted:
        return 0
    if arguments.check:
        print("README.md: the settings differ; run scripts/readme_settings.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
