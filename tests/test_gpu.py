"""Training on a GPU: whole iterations replayed as CUDA graphs, no waiting inside the loop, files that travel.

A CPU goes as far as it can: there a stand-in for CUDA's recorder undoes what was recorded and a replay does it again.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
from tiny import FastCrossEntropy, make, weights

import dcgan_utils as du

needs_gpu = pytest.mark.gpu
KINDS = [du.FastDCGAN, du.StableDCGAN, du.DCGAN, du.ConditionalDCGAN, du.WGANGP]


@pytest.fixture
def data(mnist_small):
    """Return 128 digits: sixteen batches of 8."""
    return mnist_small[0][:128], mnist_small[1][:128]


def state(gan) -> dict:
    """Return copies of all that an iteration changes."""
    networks = [net.state_dict() for net in (gan.generator, gan.discriminator, gan.average) if net is not None]
    optimizers = [list(part.state.values()) for part in (gan.optimizer_D, gan.optimizer_G)]
    return copy.deepcopy({"networks": networks, "optimizers": optimizers, "rng": torch.get_rng_state()})


def put_back(gan, kept: dict) -> None:
    """Undo an iteration, in the tensors that it changed."""
    now = [net.state_dict() for net in (gan.generator, gan.discriminator, gan.average) if net is not None]
    pairs = list(zip(now, kept["networks"], strict=True))
    for part, old in zip((gan.optimizer_D, gan.optimizer_G), kept["optimizers"], strict=True):
        pairs += zip(part.state.values(), old, strict=True)
    with torch.no_grad():
        for mine, old in pairs:
            for name, value in mine.items():
                value.copy_(old[name])
    torch.set_rng_state(kept["rng"])


@pytest.fixture
def recorder(monkeypatch):
    """Let `train` record on a CPU; return the list of replays, each with the constants that it stood for."""
    replays = []

    class Graph:
        """Stand for torch.cuda.CUDAGraph."""

        def replay(self):
            found = {key: entry for key, entry in Graph.gan._graphs.graphs.items() if entry[0] is self}
            ((key, (_, places, row)),) = found.items()
            replays.append(key)
            row.copy_(Graph.gan.play(places))

    @contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        before = state(Graph.gan)
        yield
        put_back(Graph.gan, before)

    def can_record(gan):
        Graph.gan = gan
        return gan.config.cuda_graphs

    monkeypatch.setattr(du.Trainer, "_can_record", can_record)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return replays


class Graphs(du.Callback):
    """Count what was recorded, which is gone after the training."""

    def on_train_end(self, gan):
        self.count = None if gan._graphs is None else len(gan._graphs.graphs)


class Steer(du.Callback):
    """Change the Config after some batches."""

    def on_batch_end(self, gan):
        if gan.step == 20:
            gan.reconfigure(lr_G=0.001, noise_D=0.1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.recipe)
def test_replayed_iterations_are_those_that_would_have_been_taken(kind, data, recorder):
    gans, penalty_every = {}, 2 if kind is du.FastDCGAN else 1
    for replay in (False, True):
        gan = gans[replay] = make(kind, batch_size=8, cuda_graphs=replay, log_every=1, penalty_every=penalty_every)
        gan.train(2, data=data, callbacks=[Steer()], max_seconds=1e9)
    assert torch.equal(weights(gans[True].generator), weights(gans[False].generator))
    assert torch.equal(weights(gans[True].discriminator), weights(gans[False].discriminator))
    assert gans[True].history.batches == gans[False].history.batches
    assert len({key[0][2] for key in recorder}) == (2 if penalty_every == 2 else 1)  # with the penalty, and without
    assert len({key[0][0] for key in recorder}) == 2  # before and after the Config changed
    # of two epochs of 16 iterations; the first three of each kind are taken as they are
    assert len(recorder) == 32 - 3 * len(set(recorder))


def test_what_changes_in_every_iteration_is_not_recorded(data, recorder):
    make(du.FastDCGAN, batch_size=8, noise_D=0.5, noise_D_batches=100).train(1, data=data, callbacks=[])
    assert not recorder
    make(du.FastDCGAN, batch_size=8, noise_D=0.5, noise_D_batches=4).train(1, data=data, callbacks=[])
    assert recorder  # faded


def test_who_is_not_recorded():
    assert not any(make(kind)._can_record() for kind in KINDS if not torch.cuda.is_available())
    gan = make(du.FastDCGAN)
    gan.device = torch.device("cuda")
    assert gan._can_record()
    gan.world = 2
    assert not gan._can_record()
    for off in ({"cuda_graphs": False}, {"optimizer": "sgd"}):
        gan = make(du.FastDCGAN, **off)
        gan.device = torch.device("cuda")
        assert not gan._can_record()
    gan = make(du.ProgressiveGAN)
    gan.device = torch.device("cuda")
    assert not gan._can_record()


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.recipe)
def test_a_gpu_replays_what_it_would_have_done(kind, precision, data):
    """Kernels may add in another order from run to run, so the weights agree to a bound only."""
    gans, graphs = {}, {False: Graphs(), True: Graphs()}
    settings = {"batch_size": 8, "log_every": 1, "device": "cuda", "precision": precision}
    for replay in (False, True):
        gan = gans[replay] = make(kind, cuda_graphs=replay, **settings)
        gan.train(1, data=data, callbacks=[graphs[replay]], max_seconds=1e9)
    assert graphs[True].count
    assert graphs[False].count is None
    assert gans[True].step == gans[False].step > 3
    mine, other = (gan.history.batches for gan in (gans[True], gans[False]))
    bound = 0.01 if precision == "fp32" else 0.1
    for name in ("loss_D", "loss_G", "D_x"):  # three as they are and five replayed; later, rounding has grown
        assert mine[name][:8] == pytest.approx(other[name][:8], abs=bound * max(1, max(map(abs, other[name]))))
    assert torch.equal(gans[True]._rng["cuda"], gans[False]._rng["cuda"])  # as many random numbers
    moved = [weights(gan.generator) - weights(make(kind, device="cuda").generator) for gan in gans.values()]
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_weight_that_falls_does_so_in_replays_too(device, data):
    """With networks that stay as they are, D's gradient is as long as its heaviest part: that of wrong labels."""
    fields = {"lr_G": 0.0, "lr_D": 0.0, "gradient_penalty": 0.0, "batch_norm_D": True, "matching_weight": 100.0}
    fields |= {"batch_size": 8, "num_epochs": 1, "log_every": 1, "precision": "fp32"}
    lengths = []
    for replay in (True, False):
        gan = make(du.FastDCGAN, device=device, cuda_graphs=replay, **fields)
        place = gan.rate_left
        gan.train(data=data, callbacks=[])
        assert isinstance(place, torch.Tensor) == (device == "cuda")
        assert device == "cpu" or gan.rate_left is place
        assert float(gan.rate_left) == pytest.approx(2 / 16)
        lengths.append(gan.history.batches["grad_D"])
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)
    assert max(lengths[0][-2:]) < 0.4 * min(lengths[0][:8])  # a quarter and an eighth of the weight


@needs_gpu
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.recipe)
def test_nothing_in_the_loop_waits_for_the_gpu(kind, replay, data):
    gan = make(kind, batch_size=8, device="cuda", precision="fp16", cuda_graphs=replay)
    batches = None

    class Iterate(du.Callback):
        def on_train_begin(self, gan):
            nonlocal batches
            batches = gan._epoch_batches()
            for number, batch in enumerate(batches):
                torch.cuda.set_sync_debug_mode(
                    "error" if number not in (0, 3, 4, 5) else "default"
                )  # 3 to 5: recording
                gan._follow_schedule()
                with gan._own_rng():
                    gan._iterate(batch)
            torch.cuda.set_sync_debug_mode("default")
            gan.stop("enough")

    try:
        gan.train(1, data=data, callbacks=[Iterate()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gan.step == 16 // max(1, gan.config.d_steps)


@needs_gpu
def test_gpu_checkpoints_go_on_there_and_on_a_cpu(data, tmp_path):
    gan = make(du.FastDCGAN, batch_size=8, device="cuda", precision="fp32")
    gan.train(1, data=data, callbacks=[])
    where = gan.save(tmp_path / "kept")
    again, cpu = (du.FastDCGAN.load(where, device=device) for device in ("cuda", "cpu"))
    assert torch.allclose(again.sample(8, seed=0), cpu.sample(8, seed=0), atol=1e-3)
    for one in (again, cpu):
        one.train(1, data=data, callbacks=[])
        assert one.step == 32
    back, graphs = du.FastDCGAN.load(cpu.save(tmp_path / "back"), device="cuda"), Graphs()
    back.train(1, data=data, callbacks=[graphs])
    assert graphs.count
    assert back.step == 48


class Looking(du.NonSaturatingLoss):
    """Decide by a value, which a CUDA graph cannot hold."""

    def generator(self, fake_logits, *_):
        """Return G's loss."""
        loss = super().generator(fake_logits)
        return loss * 2 if loss.item() > 1e9 else loss


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_looks_at_values_trains_all_the_same(precision, data, monkeypatch):
    """A recording that breaks off costs a warning, and nothing of the training."""
    settings = {"batch_size": 8, "device": "cuda", "precision": precision, "log_every": 1}
    plain = make(FastCrossEntropy, cuda_graphs=False, **settings)
    plain.train(1, data=data, callbacks=[])
    gan = make(FastCrossEntropy, **settings)
    gan.loss = Looking(gan.config)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs"):
        gan.train(1, data=data, callbacks=[])
    assert gan.step == 16
    assert torch.equal(gan._rng["cuda"], plain._rng["cuda"])  # the same noise from the same seed
    assert gan.history.batches["loss_D"] == pytest.approx(plain.history.batches["loss_D"], abs=0.3)
    graphs = Graphs()
    make(du.FastDCGAN, **settings).train(1, data=data, callbacks=[graphs])
    assert graphs.count  # another one in the same process records


@needs_gpu
def test_a_recording_that_breaks_off_takes_earlier_ones_with_it(data):
    """They would draw random numbers that nobody keeps."""

    class LookingAtPenalties(du.RelativisticLoss):
        """Decide by a value where a penalty is due."""

        def generator(self, fake_logits, *rivals):
            """Return G's loss."""
            loss = super().generator(fake_logits, *rivals)
            return loss * 2 if gan._penalty_is_due() and loss.item() > 1e9 else loss

    settings = {"batch_size": 8, "device": "cuda", "precision": "fp32", "penalty_every": 2}
    plain, gan = make(du.FastDCGAN, cuda_graphs=False, **settings), make(du.FastDCGAN, **settings)
    gan.loss = LookingAtPenalties(gan.config)
    plain.train(2, data=data, callbacks=[])
    with pytest.warns(UserWarning, match="goes on without CUDA graphs"):
        gan.train(2, data=data, callbacks=[])
    assert gan.step == 32
    assert torch.equal(gan._rng["cuda"], plain._rng["cuda"])


@needs_gpu
@pytest.mark.filterwarnings("ignore:training goes on without CUDA graphs")
def test_a_loss_that_somebody_holds_does_not_stop_the_training(data):
    """As in a notebook, where that of an earlier cell is still there: it may keep iterations from being recorded."""
    gan = make(du.FastDCGAN, batch_size=8, device="cuda", penalty_every=2)
    gan._set_data(data)
    held = gan.discriminator(gan._fake(8, gan.labels[:8]), gan.labels[:8]).sum()
    gan.train(2, data=data, callbacks=[])
    assert gan.step == 32
    assert weights(gan.generator).isfinite().all()
    assert held.isfinite()


@needs_gpu
@pytest.mark.parametrize("kind", [du.FastDCGAN, du.StableDCGAN, du.DCGAN], ids=lambda kind: kind.recipe)
def test_compiled_networks_are_replayed_too(kind, data):
    gan, graphs = make(kind, batch_size=8, device="cuda", compile=True), Graphs()
    gan.train(1, data=data, callbacks=[graphs])
    assert graphs.count
    assert weights(gan.generator).isfinite().all()
