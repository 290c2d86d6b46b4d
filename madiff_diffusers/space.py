"""Folders that run the demo as a Space of the Hugging Face Hub."""

import shutil
from pathlib import Path

from .pipeline_madiff import MADiffPipeline


# The requirements in setup.py; the Hub installs Gradio by the header of README.md.
REQUIREMENTS = (
    "torch>=2.6",
    "diffusers>=0.42.1",
    "accelerate>=1.0",
    "huggingface_hub>=1.32",
    "safetensors>=0.8",
    "einops>=0.8",
    "numpy>=1.26",
    "Pillow>=10.4",
    "opencv-python-headless>=4.9",
    "av>=17.1",
    "tqdm>=4.66.3",
)
GRADIO = "6.31.0"  # the version that the demo's tests were run with
PYTHON = "3.11"  # the least that the requirements take; without a line of it, the Hub has an older one

APP = '''"""The page of this Space; locally, `pip install gradio -r requirements.txt && python app.py`."""

from pathlib import Path

from madiff_diffusers import MADiffPipeline
from madiff_diffusers.demo import Demo, Limits
from madiff_diffusers.precision import best_device

limits = Limits()
pipe = MADiffPipeline.from_pretrained(Path(__file__).parent / "checkpoint"{trust}).to(best_device())
demo = Demo(pipe, limits, {name!r}).build()

if __name__ == "__main__":
    demo.launch(max_file_size=limits.upload, show_error=True, ssr_mode=False)
'''

README = """---
title: MADiff video frame interpolation
emoji: 🎞️
colorFrom: indigo
colorTo: blue
sdk: gradio
sdk_version: {gradio}
python_version: "{python}"
app_file: app.py
{license}short_description: Frames between frames, by motion-aware diffusion
---

# MADiff video frame interpolation

Makes the frames between two pictures, and videos smoother or slower, by latent diffusion that is told how the pixels move
([arXiv 2404.13534](https://arxiv.org/abs/2404.13534)). `checkpoint/` holds the weights ({name}), `madiff_diffusers/` the code;
the limits on uploads are in `app.py`.
"""


def write_space(
    folder: Path, pipeline: MADiffPipeline, name: str, license_id: str | None = None, trust_remote_code: bool = False
) -> None:
    """
    Fill a folder with a Space.

    Args:
        folder: an empty folder.
        pipeline: pipeline that the page uses.
        name: name of the checkpoint on the page.
        license_id: licence of the weights, as the Hub names it.
        trust_remote_code: whether the Space runs the checkpoint's own code, its source of motion hints.

    Raises:
        OSError: if it cannot be written.
    """
    package = Path(__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    pipeline.save_pretrained(folder / "checkpoint")
    for found in (package / "LICENSE", package.parent / "LICENSE"):
        if found.is_file():
            shutil.copyfile(found, folder / "LICENSE")
            break
    (folder / "app.py").write_text(
        APP.format(name=name, trust=", trust_remote_code=True" if trust_remote_code else ""), encoding="utf-8"
    )
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    header = f"license: {license_id}\n" if license_id else ""
    card = README.format(gradio=GRADIO, python=PYTHON, license=header, name=name)
    (folder / "README.md").write_text(card, encoding="utf-8")
