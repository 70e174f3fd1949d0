"""Training and sampling need torch and small libraries alone."""

import subprocess
import sys

PROGRAM = """
import sys
import dvdp.training.loop, dvdp.models.export, dvdp.identity
heavy = {"ray", "prefect", "mlflow", "dvc", "lmdb", "albumentations", "cv2", "sklearn", "matplotlib"}
print(*sorted(heavy & set(sys.modules)))
"""


def test_training_imports_nothing_that_a_bare_gpu_machine_lacks() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
