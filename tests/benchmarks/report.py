"""Size of a report, and the time a browser takes to open it and to turn the particle.

    python tests/benchmarks/report.py [columns]

Writes the report of a made-up slab (default 6000 columns), opens it in a headless Chromium and prints seconds from the start of reading to the drawn page.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_report import made_up, visited

from depthprob.report import write_report

CLOCK = """
const frame = () => new Promise(requestAnimationFrame);
await frame(); await frame();
const opened = performance.now();
document.getElementById("model").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
await frame(); await frame();
console.log(`${opened / 1e3} ${(performance.now() - opened) / 1e3}`);
"""


def main(columns: str = "6000") -> None:
    found = made_up(int(columns))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "report.html"
        start = time.process_time()
        write_report(path, found)
        print(f"{len(found.depth)} columns, {len(found.atoms)} atoms: written in {time.process_time() - start:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
        opened, turned = map(float, visited(path, CLOCK, Path(folder))[0].split())
        print(f"opened and drawn after {opened:.2f} s; a turn of the particle takes {turned:.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
