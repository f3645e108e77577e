"""What every test shares: the repository on the path, quiet pictures, few threads, no Kaggle mounts, real MNIST."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import dcgan_utils as du  # noqa: E402

matplotlib.use("Agg")  # not by MPLBACKEND: the notebooks' kernels would inherit it and show no figure
torch.set_num_threads(1)  # the tensors here are small; more threads only wait for each other


GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True, scope="session")
def as_on_a_cpu():
    """Hide a GPU, also from child processes, and a CPU's bf16: most tests compare with float32, some bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(autouse=True)
def gpu_where_asked_for(request, monkeypatch):
    """Show the GPU to the tests marked so, and skip them where there is none."""
    if request.node.get_closest_marker("gpu"):
        if not GPU:
            pytest.skip("needs a GPU")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # torch looks at it when it first uses the GPU


@pytest.fixture(autouse=True)
def same_inputs_in_every_run():
    """Seed the numbers that a test itself draws; a GAN draws from generators of its own."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's folder."""
    return ROOT


@pytest.fixture(autouse=True)
def no_kaggle_mounts(tmp_path_factory, monkeypatch):
    """Make the tests read the same data on Kaggle as elsewhere; a test may set mounts of its own."""
    monkeypatch.setattr("dcgan.data.KAGGLE_INPUT", tmp_path_factory.getbasetemp() / "no-kaggle-here")


@pytest.fixture(scope="session")
def mnist_test():
    """Return the 10,000 real test digits and their labels, read without the module's own search."""
    images = du.read_idx(du.EMBEDDED_MNIST / "t10k-images-idx3-ubyte.gz", dims=3)
    labels = du.read_idx(du.EMBEDDED_MNIST / "t10k-labels-idx1-ubyte.gz", dims=1).long()
    return images, labels


@pytest.fixture(scope="session")
def mnist_small(mnist_test):
    """Return the first 512 real test digits and their labels: enough to train on for a moment."""
    images, labels = mnist_test
    return images[:512].clone(), labels[:512].clone()
