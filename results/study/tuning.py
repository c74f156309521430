"""Print the table of the trainings that chose the settings of `strong`. Run it from the
repository's root:

python results/study/tuning.py

Their logs lie in results/study/tuning: columns as in kd.py's logs; "test" is held-out images.
"""

from pathlib import Path

import numpy as np

print("| | epochs | training | held-out, last epoch | held-out, last 5 epochs |")
print("|---|---|---|---|---|")
for path in sorted(Path("results/study/tuning").glob("*.csv"), reverse=True):
    log = np.genfromtxt(path, delimiter=",", names=True)
    last_five = log["test_acc"][-5:].mean()
    print(
        f"| {path.stem.replace('_', ', ')} | {len(log)} | {log['train_acc'][-1]:.2f} "
        f"| {log['test_acc'][-1]:.2f} | {last_five:.2f} |"
    )
