"""Write the plain prose that docs/quantization.md measures on, and the prose that it calibrates on.

python scripts/make_prose.py PACKAGE EVALUATION.txt CALIBRATION.txt

PACKAGE is Debian's package anarchism (15.3), unpacked by `apt-get download anarchism` and `dpkg -x anarchism_*.deb
PACKAGE`. Its paragraphs of 200 characters or more make the texts, each on a line: sections A to D are measured on, E to
J calibrated on.
"""

import hashlib
import re
import sys
from html import unescape
from pathlib import Path

PARTS = ("[A-D]", "[E-J]")


def prose(package: Path, sections: str) -> str:
    """Return the long paragraphs of `sections`, in the order of the files' names."""
    pages = sorted(package.glob(f"**/sec{sections}*.html"))
    if not pages:
        raise SystemExit(f"make_prose: no section {sections} in {package}")
    found = [
        " ".join(unescape(re.sub(r"<[^>]+>", "", paragraph)).split())
        for page in pages
        for paragraph in re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    return "\n".join(paragraph for paragraph in found if len(paragraph) >= 200) + "\n"


def main() -> None:
    package = Path(sys.argv[1])
    for path, sections in zip(map(Path, sys.argv[2:4]), PARTS, strict=True):
        text = prose(package, sections)
        path.write_text(text, encoding="utf-8")
        print(hashlib.sha256(text.encode()).hexdigest(), len(text), path)


if __name__ == "__main__":
    main()
