import subprocess
import sys

import pytest
import torch

from tests.helpers.deploy import logits_at, make_images
from tests.helpers.nets import cifar, make_elastic

pytest.importorskip("executorch")

# In a separate process, because ExecuTorch emits warnings that cannot be fixed here.
SAVE = """
import torch
from teamnet_pl.deploy import save_executorch
net = torch.load("net.pt", weights_only=False)
for depth in net.depths:
    save_executorch(net, depth, f"{depth}.pte")
"""
RUN = """
import sys
import torch
from executorch.runtime import Runtime
sys.modules["teamnet_pl"] = None
for name, (image, logits) in torch.load("expected.pt").items():
    program = Runtime.get().load_program(f"{name}.pte")
    (actual,) = program.load_method("forward").execute([image])
    torch.testing.assert_close(actual, logits, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_each_depth_runs_in_executorch(tmp_path):
    net = make_elastic(cifar(4), [7, 3])
    torch.save(net, tmp_path / "net.pt")
    image = make_images(1)
    expected = {depth.name: (image, logits_at(net, depth, image)) for depth in net.depths}
    torch.save(expected, tmp_path / "expected.pt")
    for script in (SAVE, RUN):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "d3.pte").stat().st_size < (tmp_path / "d7.pte").stat().st_size
