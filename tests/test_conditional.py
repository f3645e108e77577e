"""Three ways to let D see the label, in both families of networks; and the 64×64 recipe that draws what one asks."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, make, same
from torch import nn

import dcgan_utils as du
from dcgan_utils import Config

WAYS = ("projection", "matching", "concatenation", "auxiliary")
KINDS = (du.ConditionalDCGAN, du.FastDCGAN)


@pytest.fixture(scope="module")
def digits():
    images, labels = du.load_images("mnist", "test")
    return images[:96], labels[:96]


def discriminator(kind, way):
    """Return a small D in eval mode, images and labels."""
    config = kind.resolve(**TINY[kind], conditioning=way)
    torch.manual_seed(0)
    D = kind.networks[1](config).eval()
    return D, torch.randn(10, 1, config.image_size, config.image_size), torch.arange(10)


# ----------------------------------------------------------------------------------------------- what D computes
@pytest.mark.parametrize("kind", KINDS)
def test_projection_adds_the_linear_head_of_the_label(kind):
    D, images, labels = discriminator(kind, "projection")
    seen = {}
    D.class_heads.register_forward_hook(lambda layer, inputs, output: seen.update(x=inputs[0], out=output))
    answers = D(images, labels)
    shift = answers - D(images, (labels + 1) % 10)
    by_hand = torch.stack([F.linear(seen["x"][k], D.class_heads.weight, D.class_heads.bias) for k in range(10)])
    difference = by_hand[torch.arange(10), labels] - by_hand[torch.arange(10), (labels + 1) % 10]
    assert torch.allclose(shift, difference, atol=1e-5)
    assert answers.shape == (10,)


@pytest.mark.parametrize("kind", KINDS)
def test_concatenation_gives_d_a_second_channel_that_is_the_labels_map(kind):
    D, images, labels = discriminator(kind, "concatenation")
    assert D.class_heads is None
    seen = D.seen(images, labels)
    side = images.shape[2]
    assert seen.shape == (10, 2, side, side)
    assert torch.equal(seen[:, :1], images)
    for k in range(10):
        assert torch.equal(seen[k, 1], D.class_maps.weight[k].view(side, side))
    first = next(module for module in D.modules() if isinstance(module, nn.Conv2d))
    assert first.in_channels == 2
    assert not torch.allclose(D(images, labels), D(images, (labels + 1) % 10))


@pytest.mark.parametrize("kind", KINDS)
def test_an_auxiliary_d_names_the_class_and_does_not_look_at_the_label(kind):
    D, images, labels = discriminator(kind, "auxiliary")
    answers = D(images, labels)
    assert answers.shape == (10, 11)
    assert torch.equal(answers, D(images, (labels + 1) % 10))
    assert torch.equal(du.real_logit(answers), answers[:, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_matching_d_is_a_projection_that_also_tells_its_classes(kind):
    """From one seed both have the same weights: the same logit, and beside it the heads of all classes."""
    (D, images, labels), (other, _, _) = discriminator(kind, "matching"), discriminator(kind, "projection")
    answers = D(images, labels)
    assert answers.shape == (10, 11)
    assert torch.equal(du.real_logit(answers), other(images, labels))
    shifted = D(images, (labels + 1) % 10)
    assert torch.equal(answers[:, 1:], shifted[:, 1:])  # the classes do not ask which label is claimed
    n = torch.arange(10)
    moved = answers[n, 1 + labels] - answers[n, 1 + (labels + 1) % 10]
    assert torch.allclose(answers[:, 0] - shifted[:, 0], moved, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_misread_classes_cost(kind, digits):
    """By hand: -log softmax at the label, for both kinds of images in D's step."""
    gan = make(kind, conditioning="auxiliary")
    gan._set_data(digits)
    real, labels = du.normalise(gan.images[:16]), gan.labels[:16]
    gan.discriminator.eval()
    logits, cost = du.ask(gan, gan.discriminator, real, labels)
    answers = gan.discriminator(real, labels)
    by_hand = -answers[:, 1:].log_softmax(dim=1)[torch.arange(16), labels].mean()
    assert cost.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert torch.equal(logits, answers[:, 0])
    for way in ("projection", "concatenation"):
        other = make(kind, conditioning=way)
        assert du.ask(other, other.discriminator, real, labels)[1] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_both_players_pay_for_misread_classes(kind, digits):
    """The heads move in D's step; and G's gradient is another one than without the cost."""
    gan = make(kind, conditioning="auxiliary", batch_size=16)
    before = gan.discriminator.class_heads.weight.detach().clone()
    gan.train(1, data=digits, callbacks=[])
    assert not torch.equal(gan.discriminator.class_heads.weight, before)
    gan.generator.train()
    labels, images = gan.labels[:16], du.normalise(gan.images[:16])
    gradients = []
    for asked in (labels, (labels + 5) % 10):  # the same fakes, other digits asked of them: only the cost differs
        torch.manual_seed(0)
        fake = gan._fake(16, labels)
        logits, cost = du.ask(gan, gan.discriminator.eval(), fake, asked)
        rivals = [torch.zeros_like(logits)] if gan.config.loss == "relativistic" else []
        loss = gan.loss.generator(logits, *rivals) + cost
        gradients.append(torch.autograd.grad(loss, gan.generator.embedding.weight)[0])
    assert not torch.allclose(*gradients)
    assert images.shape[0] == 16


# ----------------------------------------------------------------------------------------------- matching labels
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_wrong_label_costs(kind, digits):
    """By hand: a share of softplus(wrong - right), of real images and only where D's step asks for it."""
    gan = make(kind, conditioning="matching", matching_weight=0.3)
    gan._set_data(digits)
    real, labels = du.normalise(gan.images[:16]), gan.labels[:16]
    D = gan.discriminator.eval()
    torch.manual_seed(7)
    logits, cost = du.ask(gan, D, real, labels, real=True)
    torch.manual_seed(7)
    wrong = (labels + torch.randint(1, 10, (16,))) % 10
    classes = D(real, labels)[:, 1:].tolist()
    by_hand = [math.log1p(math.exp(row[w] - row[k])) for row, w, k in zip(classes, wrong, labels, strict=True)]
    assert cost.item() == pytest.approx(sum(by_hand) / 16 * 0.3, rel=1e-5)
    assert cost.dtype == torch.float32
    assert torch.equal(logits, D(real, labels)[:, 0])
    state = torch.get_rng_state()
    for one in (du.ask(gan, D, real, labels), du.ask(gan, D, gan._fake(16, labels), labels, real=False)):
        assert one[1] == 0.0
    torch.set_rng_state(state)
    assert du.ask(gan, D, real, labels)[1] == 0.0
    assert torch.equal(torch.get_rng_state(), state)  # nor is a label drawn
    for way in ("projection", "concatenation"):
        other = make(kind, conditioning=way)
        assert du.ask(other, other.discriminator, real, labels, real=True)[1] == 0.0
    free = make(kind, conditioning="matching", conditional=False)
    assert du.ask(free, free.discriminator, real, None, real=True)[1] == 0.0


def test_the_weight_of_wrong_labels_fades_as_the_learning_rates_do(digits, monkeypatch):
    """By the drawn label's cost: flat for half the run, then down to the last batch; else and by default flat."""
    costs, ask = {}, du.ask

    def noted(gan, network, images, labels, real=False):
        answers, cost = ask(gan, network, images, labels, real)
        if real:
            state = torch.get_rng_state()
            torch.manual_seed(0)
            with torch.no_grad():  # a D that never learns, so that only the weight can change
                costs[key].append(ask(gan, lambda *_: torch.eye(16, 11), images[:16], labels[:16] * 0, True)[1].item())
            torch.set_rng_state(state)
        return answers, cost

    monkeypatch.setattr(du, "ask", noted)
    for key in ((True, "linear_tail"), (False, "linear_tail"), (True, "constant")):
        costs[key] = []
        gan = make(du.FastDCGAN, matching_fades=key[0], lr_schedule=key[1], batch_size=16, num_epochs=1)
        gan.train(data=(digits[0][:96], digits[1][:96]), callbacks=[])
    first = costs[True, "constant"][0]
    assert first > 0
    assert costs[False, "linear_tail"] == costs[True, "constant"] == pytest.approx([first] * 6)
    falls = [1, 1, 1, 1, 2 / 3, 1 / 3]  # of a batch before it is taken
    assert costs[True, "linear_tail"] == pytest.approx([first * share for share in falls], rel=1e-5)


def test_what_is_left_of_the_rates_follows_the_clock_and_stays_one_tensor_on_a_gpu(digits, monkeypatch):
    """A CUDA graph reads the tensor that it was recorded with; here a tensor stands for it."""
    gan = make(du.FastDCGAN, matching_weight=0.3)
    gan.train(1, data=digits, callbacks=[], max_seconds=1e9)
    gan._max_seconds, gan.rate_left = 60.0, torch.tensor(1.0)
    place, answers = gan.rate_left, torch.eye(16, 11)
    for elapsed, left in ((29.0, 1.0), (45.0, 0.5), (60.0, 0.0), (0.0, 1.0)):
        gan._elapsed = elapsed
        gan.epoch, gan.position = 0, gan.config.batch_size
        gan._follow_schedule()
        assert gan.rate_left is place
        assert place.item() == pytest.approx(left)
        torch.manual_seed(0)
        _, cost = du.ask(gan, lambda *_: answers, torch.zeros(16), torch.zeros(16, dtype=torch.long), real=True)
        torch.manual_seed(0)
        wrong = torch.randint(1, 10, (16,))
        by_hand = torch.nn.functional.softplus(answers[range(16), 1 + wrong] - answers[:, 1]).mean()
        assert cost.item() == pytest.approx(0.3 * left * by_hand.item(), abs=1e-7)


def test_the_wrong_label_is_each_of_the_others_as_often():
    """Heads that favour one class by much: it costs that much when it is drawn, else nothing."""
    gan = make(du.FastDCGAN, matching_weight=0.5)
    labels = torch.full((9000,), 4)
    for favoured in (0, 5, 9, 4):
        answers = torch.zeros(9000, 11)
        answers[:, 1 + favoured] = 1000.0
        torch.manual_seed(favoured)
        _, cost = du.ask(gan, lambda images, labels, answers=answers: answers, torch.zeros(9000), labels, real=True)
        if favoured == 4:
            assert cost.item() == 0  # the right one is never drawn as a wrong one
            continue
        rest = math.log(2) / 2 * 8 / 9  # all other pairs are level
        drawn = 500 / 9
        assert cost.item() == pytest.approx(drawn + rest, abs=5 * 500 * math.sqrt(8 / 81 / 9000))


def test_only_real_images_in_ds_step_pay_for_wrong_labels(digits, monkeypatch):
    seen, ask = [], du.ask

    def noted(gan, network, images, labels, real=False):
        answers, cost = ask(gan, network, images, labels, real)
        training = [p.requires_grad for p in gan.discriminator.parameters()]
        seen.append((any(training), real, float(cost.detach() if isinstance(cost, torch.Tensor) else cost)))
        return answers, cost

    monkeypatch.setattr(du, "ask", noted)
    gan = make(du.FastDCGAN)
    gan.train(1, data=(digits[0][:16], digits[1][:16]), callbacks=[])
    (of_real, of_fake), of_g = seen[:2], seen[2:]
    assert of_real[:2] == (True, True)
    assert of_real[2] > 0
    assert of_fake == (True, False, 0.0)
    assert of_g == [(False, False, 0.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_wrong_labels_moves_heads_and_features(kind, digits):
    gan = make(kind, conditioning="matching")
    gan._set_data(digits)
    _, cost = du.ask(gan, gan.discriminator, du.normalise(gan.images[:16]), gan.labels[:16], real=True)
    cost.backward()
    assert gan.discriminator.class_heads.weight.grad.norm() > 0
    assert gan.discriminator.layers[0].weight.grad.norm() > 0
    if kind is du.FastDCGAN:
        assert not gan.discriminator.head.weight.grad.any()  # 'real' is not asked


def ranked(gan, images, labels):
    """Return the share of (real image, wrong label) pairs whose right label stands above the wrong one."""
    kept = []
    hook = gan.discriminator.class_heads.register_forward_hook(lambda layer, inputs, output: kept.append(output))
    with torch.no_grad():
        gan.discriminator.eval()(images, labels)
    hook.remove()
    (classes,) = kept
    right = classes.gather(1, labels[:, None])
    return (right > classes).sum().item() / (len(labels) * 9)


@pytest.mark.parametrize("seed", [42, 1])
def test_matching_teaches_which_label_is_right_sooner_than_projection(seed):
    """After 60 small batches, of real images that training has not seen; at first a coin's toss."""
    images, labels = du.load_images("mnist", "test")
    new, of_new = du.normalise(images[-500:]), labels[-500:]
    after = {}
    for way in ("matching", "projection"):
        settings = {"ndf": 8, "batch_size": 32, "lr_schedule": "constant", "matching_weight": 0.5}
        gan = make(du.FastDCGAN, conditioning=way, seed=seed, **settings)
        before = ranked(gan, new, of_new)
        assert 0.4 < before < 0.6
        gan.train(1, data=(images[:1920], labels[:1920]), callbacks=[])
        after[way] = ranked(gan, new, of_new)
    assert after["matching"] > 0.7  # measured 0.73 to 0.83, with projection 0.54 to 0.63
    assert after["matching"] > after["projection"] + 0.1


def test_without_labels_nothing_is_added():
    for way in WAYS:
        gan = make(du.DCGAN, conditioning=way)
        assert (gan.generator.embedding, gan.discriminator.class_heads, gan.discriminator.class_maps) == (None,) * 3
        assert not any("class" in name or "embedding" in name for name in gan.discriminator.state_dict())
    assert du.count_parameters(du.DCGAN.networks[0](Config()))[0] == 3_576_577
    plain, asked = (du.count_parameters(du.DCGAN.networks[1](Config(conditional=c)))[1] for c in (False, True))
    assert asked - plain == 10 * (8192 + 1)  # ten linear heads on 512·4·4 features


# ----------------------------------------------------------------------------------------------- in training
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_trains_saves_resumes_and_scores(kind, way, digits, tmp_path):
    gan = make(kind, conditioning=way)
    history = gan.train(1, data=digits, callbacks=[])
    assert min(history["move_D"][0], history["move_G"][0]) > 1e-4
    assert all(math.isfinite(history[name][0]) for name in du.METRICS)
    gan.save(tmp_path / "c")
    again = kind.load(tmp_path / "c")
    assert again.config.conditioning == way
    for one in (gan, again):
        one.train(1, data=digits, callbacks=[])
    assert same(gan, again)
    images = gan.sample(4, seed=1, digits=[3, 1, 4, 1])
    assert not torch.equal(images, gan.sample(4, seed=1, digits=[2, 7, 1, 8]))
    scores = gan.score(images, [3, 1, 4, 1])
    assert scores.shape == (4,)
    if gan.config.loss == "bce":
        assert 0 <= scores.min() <= scores.max() <= 1
    with torch.no_grad():
        logits = du.real_logit(gan.discriminator.eval()(images, torch.tensor([3, 1, 4, 1])))
    assert torch.allclose(scores, logits.sigmoid() if gan.config.loss == "bce" else logits, atol=1e-5)
    with pytest.raises(ValueError, match="conditioning is built in"):
        gan.reconfigure(conditioning=next(other for other in WAYS if other != way))


@pytest.mark.parametrize("way", WAYS)
def test_penalties_and_other_losses_go_with_labels(way, digits):
    gan = make(du.FastDCGAN, conditioning=way, loss="wasserstein", gradient_penalty=10.0, batch_norm_D=False)
    history = gan.train(1, data=digits, callbacks=[])
    assert history["slope"][0] > 0
    fake = gan.fixed_samples(10)
    slopes = du.slopes(gan.discriminator, fake, torch.arange(10))
    other = du.slopes(gan.discriminator, fake, (torch.arange(10) + 1) % 10)
    assert torch.allclose(slopes, other) == (way == "auxiliary")  # its 'real' does not ask for the label


def test_the_64x64_recipe_draws_the_digit_asked_for(tmp_path, digits):
    assert du.RECIPES["conditional"] is du.ConditionalDCGAN
    plain, asked = du.DCGAN.defaults, du.ConditionalDCGAN.defaults
    assert (asked.image_size, asked.conditional, asked.conditioning) == (64, True, "projection")
    assert {name for name in vars(plain) if getattr(plain, name) != getattr(asked, name)} == {"conditional"}
    gan = make(du.ConditionalDCGAN, out_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"ConditionalDCGAN is class-conditional.*none"):
        gan.train(1, data=digits[0], callbacks=[])
    gan.train(1, data=digits, callbacks=[])
    for wrong in ([10, 1, 1], [-1, 0, 0], [1, 2]):
        with pytest.raises(ValueError, match="whole numbers from 0 to 9"):
            gan.sample(3, digits=wrong)
    picture = gan.generate_images(1)
    grid = picture.axes[0].images[0].get_array()
    side = gan.config.image_size
    assert grid.shape[:2] == (10 * (side + 2) + 2, 10 * (side + 2) + 2)  # ten rows, a column for each digit
    top = torch.as_tensor(grid[2 : 2 + side, 2 + 3 * (side + 2) : 2 + 3 * (side + 2) + side, 0])
    assert torch.allclose(top, (gan.fixed_samples(100)[3, 0] + 1) / 2, atol=1e-5)
    assert gan._digits(100, None)[3] == 3
    with pytest.raises(ValueError, match="conditioning = 'film'"):
        make(du.ConditionalDCGAN, conditioning="film")


@pytest.mark.parametrize("way", WAYS)
def test_d_learns_to_use_the_label(way, digits):
    """Trained on two flat greys that only the label tells apart, G draws the one that is asked for."""
    images = torch.cat([torch.full((128, 28, 28), 40), torch.full((128, 28, 28), 215)]).to(torch.uint8)
    labels = torch.arange(256) // 128
    gan = make(
        du.FastDCGAN, ngf=8, ndf=8, conditioning=way, num_classes=2, lr_schedule="constant", ema=0.0, batch_size=32
    )
    gan.train(15, data=(images, labels), callbacks=[])
    dark, light = (gan.sample(32, seed=0, digits=k).mean().item() for k in (0, 1))
    assert light - dark > 0.8  # the data: 1.37
