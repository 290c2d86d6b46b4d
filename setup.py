from pathlib import Path

from setuptools import find_packages, setup


EVAL = ["lpips>=0.1.4", "torchvision", "scikit-image>=0.22", "torch-fidelity>=0.4.0", "matplotlib>=3.9", "Jinja2>=3.1"]
# MADiff itself does not import transformers: its design card names the package, and Diffusers' training helpers look for it.
TRAIN = [*EVAL, "transformers>=5.23", "datasets>=5.2", "PyYAML>=6.0.2", "tensorboard>=2.18", "h5py>=3.11"]
# What datasets stores its tables with needs NumPy 2, and what is compiled against NumPy a version that knows it.
TRAIN += ["numpy>=2.0", "opencv-python-headless>=4.10", "scikit-image>=0.24"]
# Older exporters stop at names of nested inputs (2.6) or at `sym_float` (2.7); between these and 2.13, none was tried.
ONNX = ["torch>=2.13", "onnx>=1.23", "onnxscript>=0.7.2", "onnxruntime>=1.20"]
# Their next versions may format and find otherwise.
LINT = ["ruff~=0.17.6", "mypy~=2.4.1"]
TEST = [
    "pytest>=8.0",
    "nbclient>=0.10",
    "ipykernel>=6.29",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    *TRAIN,
    *ONNX,
    *LINT,
]

DEMO = ["gradio>=6.31"]

setup(
    name="madiff_diffusers",
    version="0.2.0.dev0",
    description="MADiff: motion-aware latent diffusion for video frame interpolation, as a Diffusers pipeline",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["madiff_diffusers", "madiff_diffusers.*"]),
    package_data={
        "madiff_diffusers": [
            "LICENSE",
            "py.typed",
            "examples/*.jpg",
            "checkpoints/*/README.md",
            "checkpoints/*/examples/*.png",
            "checkpoints/*/*.json",
            "checkpoints/*/*/*.json",
            "checkpoints/*/*/*.safetensors",
            "evaluation/pages/*",
        ]
    },
    install_requires=[
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
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "demo": DEMO,
        "onnx": ONNX,
        "test": TEST,
        "all": [*TEST, *DEMO],
    },
    entry_points={"console_scripts": ["madiff=madiff_diffusers.commands.madiff_cli:main"]},
)
