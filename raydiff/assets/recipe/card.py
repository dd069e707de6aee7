"""The model card, from a template and the measured figures."""

from pathlib import Path
from string import Template

from raydiff.assets.recipe.words import COLOURS, NAMES, STYLE_ORDER, STYLES, held_out_prompts


def write_card(metrics: dict, file: Path) -> None:
    file.write_text(Template(TEMPLATE).substitute(figures(metrics)), encoding="utf-8")


def figures(metrics: dict) -> dict[str, str | int]:
    """The metrics as they stand in the text."""
    generated, held_out = metrics["generated"], metrics["held_out"]
    sweep = "\n".join(
        f"| {guidance} | {percent(row['top1'])} | {percent(row['style'])} | {percent(row['background'])} |"
        for guidance, row in metrics["guidance"].items()
    )
    sizes = "\n".join(f"| `{part}` | {size / 1e6:.2f} MB |" for part, size in metrics["bytes"].items())
    return {
        "names": ", ".join(NAMES),
        "styles": ", ".join(STYLES),
        "colours": ", ".join(COLOURS),
        "order": " > ".join(STYLE_ORDER),
        "held_out_prompts": len(list(held_out_prompts())),
        "vae_psnr": metrics["vae"]["psnr"],
        "vae_psnr_held_out": metrics["vae"]["psnr_held_out"],
        "samples": generated["samples"],
        "held_out_samples": held_out["samples"],
        **{f"generated_{key}": percent(generated[key]) for key in ("top1", "clip_top1", "style", "background")},
        **{f"held_out_{key}": percent(held_out[key]) for key in ("top1", "clip_top1", "style", "background")},
        **{f"judge_{key}": percent(value) for key, value in metrics["judges"].items()},
        **{f"clip_{key}": percent(value) for key, value in metrics["clip"].items()},
        "pairs": percent(metrics["aesthetic"]["pair_accuracy"]),
        "pairs_held_out": percent(metrics["aesthetic"]["pair_accuracy_held_out"]),
        "pairs_held_out_count": metrics["aesthetic"]["held_out_pairs"],
        "scores": ", ".join(f"{style} {score}" for style, score in metrics["aesthetic"]["mean_score"].items()),
        "sweep": sweep,
        "sizes": sizes,
    }


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


TEMPLATE = """\
# The embedded model: emoji, 32 pixels

A small but complete text-to-image model, with the scorers that reward and preference fine-tuning needs. It is made for
trying and testing fine-tuning methods on a CPU within minutes; it is no general image model.

![Every name](grid_names.png)

*"a cat", "a dog", ... : one sample each of the 69 names, fixed seed, nothing picked by hand.*

## What it draws

Prompts have the form `a {name}[ face][ in {style} style][ on a {colour} background]`.

- **Names (69):** $names.
- **Styles (6):** $styles.
- **Backgrounds (10):** $colours.

Of all pairs (name, style) and (name, colour) about one in 13 was held out: pictures of these styles were left out of
the training of pipeline, CLIP and style scorer, and the names were never put on these colours. `prompts/held_out.txt`
lists them ($held_out_prompts prompts), `prompts/train.txt` the others, `names.json` both with the palette.

| backgrounds | styles |
|---|---|
| ![Backgrounds](grid_backgrounds.png) | ![Styles](grid_styles.png) |

*Left: eight names on the ten colours. Right: the same names in the six styles.*

![Held-out pairs](grid_held_out.png)

*All held-out prompts, in the order of `prompts/held_out.txt`.*

## Parts

- `pipeline`: `StableDiffusionPipeline` of a UNet (64 and 128 channels, 4.0M parameters), a CLIP text encoder (2 layers
  of 128), a VAE (0.66M) whose latents are 8 x 8 with 8 channels, a DDIM scheduler with Stable Diffusion 1's noise and
  trailing spacing, and a CLIP tokenizer with 24 positions.
- `clip`: `CLIPModel` (3 layers of 96 over 4-pixel patches), trained contrastively on the same captions.
- `aesthetic`: style scorer, an MLP over the CLIP's normalised picture embedding in the format of LAION's
  improved-aesthetic-predictor.
- `classifier`: `ResNetForImageClassification` over the 69 names; `style_classifier`: the same over the 6 styles.

| folder | size |
|---|---|
$sizes

Weights are float16 on disk and load as float32. Everything loads offline through `from_pretrained`. Pictures are
normalised with mean 0.5 and deviation 0.5.

## Figures

Measured by the functions of the recipe's `evaluate` stage on the exported files; `metrics.json` has them all.
Samples take 20 DDIM steps
with guidance 3.

| what | figure |
|---|---|
| VAE, PSNR over 512 freshly drawn pictures of the training art | $vae_psnr dB |
| VAE, PSNR over pictures of the held-out art | $vae_psnr_held_out dB |
| **samples with the right name**, by `classifier`, top-1 of 69, $samples samples | $generated_top1 |
| the same by `clip`, zero-shot | $generated_clip_top1 |
| **samples with the right background**, where the prompt names one | $generated_background |
| samples with the right style, by `style_classifier`, where the prompt names one | $generated_style |
| held-out prompts ($held_out_samples samples): right name | $held_out_top1 |
| held-out prompts: right background | $held_out_background |
| held-out prompts: right style | $held_out_style |
| `classifier` on freshly drawn pictures | $judge_classifier |
| `style_classifier` on freshly drawn pictures | $judge_style_classifier |
| background rule on freshly drawn pictures | $judge_background |
| `clip`, zero-shot name on training art | $clip_top1 |
| `clip`, zero-shot name on held-out pictures | $clip_top1_held_out |
| `aesthetic`, pairs of training pictures in the right order | $pairs |
| `aesthetic`, $pairs_held_out_count pairs with a held-out picture | $pairs_held_out |

The background is measured in closed form: the palette colour nearest to the median of the picture's border. Prompts for
samples go through all names in turn and mention style and background as often as the training captions do (45 % and
60 %). The judges are trained on all the art, with decoded, blurred and noisy copies.

Guidance, over 138 samples each:

| guidance | name | style | background |
|---|---|---|---|
$sweep

### The style scorer's truth

Of two pictures of one name, the one whose style stands earlier is preferred: $order. This order is a convention: it
makes a learned preference checkable against a known truth. Mean scores: $scores.

## Data and licences

Rendered from npm packages with openly licensed art: Fluent Emoji (Microsoft, MIT; flat, gradient, 3d), Noto Emoji and
its first version (Google, Apache-2.0; noto, blob), FxEmojis (Mozilla, Apache-2.0; firefox); names from emojibase-data
(MIT). `NOTICE` beside this folder has versions and licence texts. There are 445 pictures; flip, scale, shift and
background are drawn fresh.

## Training

AdamW, float32 weights with bfloat16 autocast, single-thread processes that average their weights every ten steps, EMA
0.999, on two cores.

| part | steps | batch | loss |
|---|---|---|---|
| VAE | 7 000 | 2 processes x 16 | L1, L1 of gradients, MSE, 3e-6 KL |
| UNet and text encoder | 8 500 | 4 x 16 (the first 1 300 steps 2 x 32) | noise, Min-SNR-5, 10 % of captions dropped |
| CLIP | 1 200 | 64 | symmetric contrastive |
| style scorer | 400 | 64 pairs | Bradley-Terry |
| judges | 800 each | 64 | cross-entropy |

The pictures that the UNet sees are not mirrored; all the others are, at random.

These weights were made with settings that changed on the way: the UNet's learning rate was 1e-3 for its first 550 or so steps
and 1.5e-3 after, and two of its four caches of latents were copies. The recipe holds the last settings; it has not been run
from start to finish in one go.

## Limits

- It knows 69 nouns and the caption form above; other words are noise to it.
- It was trained on a few pictures per name, and largely reproduces them: that is what makes it judgeable.
- The judge of names knows all the art and the names differ clearly, so its figure is near its ceiling; looking at the
  grids, about one cell in twelve is blurred (an animal on a background of its own colour, for the most part).
- Style is learned least. A style that was held out for a name is rarely drawn: the model falls back on one it has seen.
- "gradient" and "3d" differ by little at 32 pixels, also to the judges.
- Guidance above 4 saturates colours.

## Making it again

`python -m raydiff.assets.recipe --work DIR` runs everything: about two hours on two CPU cores. It needs npm and
resvg-py, skips stages that are done, and resumes training where it was stopped.
"""
