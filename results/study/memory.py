"""Print how much memory a training took. Arguments are kd.py's. Linux only. Run it from the
repository's root:

python results/study/memory.py --stage teacher --epochs 1 --limit 4096 --results-dir runs/memory
"""

import resource
import sys

sys.path.append(".")
import kd

kd.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"{' '.join(sys.argv[1:])}: at most {peak:.1f} GiB")
