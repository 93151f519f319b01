"""Write the exact versions that the ranges of pyproject.toml allow today, for this Python.

Every release of the line takes them: some packages ask for one of its later bug fixes.
"""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = "dev,cuda,tpu"

line, python = ("py311", "3.11.0") if sys.version_info < (3, 12) else ("py312", "3.12.0")
pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
# pip resolves for another Python only with built packages and a target, which a dry run leaves be.
pip += ["--python-version", python, "--only-binary=:all:", "--target", str(HERE / "unused")]
pip += ["--report", "-"]
report = subprocess.run(
    [*pip, f"{HERE.parent}[{EXTRAS}]"], check=True, capture_output=True, text=True
)
found = [item["metadata"] for item in json.loads(report.stdout)["install"]]
lines = [f"{m['name']}=={m['version']}\n" for m in found if m["name"] != "scanax"]
text = f"# scanax[{EXTRAS}]; `make constraints` writes this file\n"
(HERE / f"{line}.txt").write_text(text + "".join(sorted(lines, key=str.lower)))
