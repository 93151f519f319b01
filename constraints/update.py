"""Write the exact versions that the ranges of pyproject.toml allow today, for this Python."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXTRAS = "dev,cuda,tpu"

pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
report = subprocess.run(
    [*pip, "--report", "-", f"{HERE.parent}[{EXTRAS}]"], check=True, capture_output=True, text=True
)
found = [item["metadata"] for item in json.loads(report.stdout)["install"]]
lines = [f"{m['name']}=={m['version']}\n" for m in found if m["name"] != "scanax"]
line = "py311" if sys.version_info < (3, 12) else "py312"
text = f"# scanax[{EXTRAS}]; `make constraints` writes this file\n"
(HERE / f"{line}.txt").write_text(text + "".join(sorted(lines, key=str.lower)))
