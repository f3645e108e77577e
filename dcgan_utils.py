"""Train DCGANs on MNIST, watch their health, repair them and look at what they made.

    from dcgan_utils import FastDCGAN

    gan = FastDCGAN()
    gan.train(max_seconds=40)                 # a real-vs-fake grid and a health panel after every epoch
    gan.generate_images()                     # a figure, also saved under outputs/
    gan.save("outputs/my_gan")                # safetensors + JSON; FastDCGAN.load("outputs/my_gan") goes on

`DCGAN` is the 64×64 PyTorch recipe, `StableDCGAN` the 28×28 TensorFlow one rebuilt in PyTorch, `FastDCGAN` ours.
`ConditionalDCGAN` is the first of them with digits to choose, `WGANGP` has a critic in the place of D. This file lists
what is public, by subject; the code is in the package `dcgan`, one file a subject. `python dcgan_utils.py --help` is
the command line.
"""

import sys

# numbers
from dcgan.config import Config, by_profile, config_from_record, configure, kaggle_run, parse_fields, prepare_file
from dcgan.config import profile

# data
from dcgan.data import EMBEDDED_MNIST, KAGGLE_INPUT, MNIST_SHA256, as_images, load_images, normalize, read_csv, read_idx
from dcgan.data import resize_images

# networks
from dcgan.networks import DCGANDiscriminator, DCGANGenerator, FastDiscriminator, FastGenerator
from dcgan.networks import EqualizedConv2d, MinibatchStdDev, PixelNorm, ProgressiveDiscriminator, ProgressiveGenerator
from dcgan.networks import StableDiscriminator, StableGenerator, tensorflow_batch_norm
from dcgan.networks import count_parameters, dcgan_widths, init_dcgan, init_glorot, init_kaiming, init_output_bias

# losses
from dcgan.losses import LOSSES, Equilibrium, HingeLoss, LeastSquaresLoss, Loss, NonSaturatingLoss, RelativisticLoss
from dcgan.losses import WassersteinLoss, gradient_norms, make_loss, real_logit

# training
from dcgan.history import EPOCH_READINGS, METRICS, Callback, DivergenceError, History
from dcgan.sampling import FIXED_SAMPLES, PREVIEW, eval_mode
from dcgan.engine import Engine, frozen
from dcgan.training import Trainer, discriminate, discriminator_step, generator_step, gradient_norm

# speed and randomness
from dcgan.randomness import draws_from, make_generator
from dcgan.convolutions import accelerate
from dcgan.acceleration import Accelerated, describe_machine, pick_device, pick_precision

# files
from dcgan.checkpoints import CheckpointError, SaveCheckpoints, newest_checkpoint, read_checkpoint, save_checkpoint

# health
from dcgan.health import DCGAN_BANDS, ICONS, STABLE_BANDS, WORDS, Band, Diagnosis, Finding, diagnose
from dcgan.health import epochs_without_gain, nn_distance_ratio, panel_html, panel_text, pixel_std_ratio

# evaluation
from dcgan.evaluation import CLASSIFIER_SHA256, Classified, DigitClassifier, EvaluateEachEpoch, RealStatistics, Scores
from dcgan.evaluation import classify, compare_features, frechet_distance, kernel_distance, load_classifier
from dcgan.evaluation import manifold_metrics, nearest_distance, score_samples, to_uint8

# pictures and reports
from dcgan.plots import COLORS, figure_png, gif_html, make_animation, plot_history, plot_images, plot_real_vs_fake
from dcgan.plots import in_notebook, save_picture
from dcgan.callbacks import BatchLines, EpochReport, ProgressBar, SaveGrids, StopAt, Tracker

# interaction
from dcgan.cockpit import SCENARIOS, Cockpit, Snapshot, explore, plot_snapshot, run_text, take_snapshot

# recipes
from dcgan.recipes import DCGAN, GAN, RECIPES, WGANGP, ConditionalDCGAN, FastDCGAN, ProgressiveGAN, StableDCGAN

from dcgan.cli import main

if __name__ == "__main__":
    sys.exit(main())
