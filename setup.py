"""Packaging of megatron-anyexperts."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-anyexperts",
    version="0.1.0",
    description="Multimodal mixture-of-experts pretraining in which every token gets as many experts as it needs",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[*find_packages(include=["megatron_anyexperts", "megatron_anyexperts.*"]), "megatron_anyexperts.configs"],
    # The shipped configurations travel with the wheel, for --config NAME without a checkout.
    package_dir={"megatron_anyexperts.configs": "pretrain/configs"},
    package_data={
        "megatron_anyexperts": ["py.typed"],
        "megatron_anyexperts.analysis": ["*.html"],
        "megatron_anyexperts.configs": ["*.yaml"],
    },
    entry_points={"console_scripts": ["anyexperts = megatron_anyexperts.cli:main"]},
    install_requires=[
        # 0.19.2 is the wheel whose internals the CPU bridge and the checkpoint fixes were checked against.
        "megatron-core>=0.19.2,<0.20",
        "torch>=2.11",
        "megatron-energon>=7.4.1,<8",
        "webdataset>=1.0",
        "av>=14",
        "datasketch>=2",
        "einops>=0.8",
        "imagehash>=4.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "numpy>=2",
        "pillow>=11",
        "psutil>=6",
        "pyarrow>=18",
        "pydantic>=2",
        "pyyaml>=6",
        "safetensors>=0.5",
        "scipy>=1.14",
        "shtab>=1.7",
        "tensorboard>=2.18",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=4.57",
        "zstandard>=0.23",
    ],
    extras_require={
        # Its torch part is compiled against the torch that is there, with the CUDA headers that came with it. Two parts
        # of the toolkit are needed that torch does without: headers that others include, and cuRAND.
        "fp8": [
            "cuda-toolkit[crt,curand]",
            "transformer-engine[core_cu13,pytorch]>=2.11",
            "ninja>=1.11",
            "pybind11>=2.13",
        ],
        # The task classifier of `anyexperts analyse`.
        "analysis": ["scikit-learn>=1.6"],
        # Reads GGUF files, for `anyexperts convert import`.
        "gguf": ["gguf>=0.17"],
        "mpi": ["mpi4py>=4.1", "openmpi>=5.0"],
        "dev": [
            # transformers loads GGUF files with it: what an import of one is compared with.
            "accelerate>=1.2",
            "boto3>=1.35",
            "gguf>=0.17",
            "hypothesis>=6.130",
            "mkdocs-gen-files>=0.6",
            "mkdocs-literate-nav>=0.6",
            "mkdocs-material>=9.7",
            "mkdocstrings-python>=2",
            "moto[server]>=5",
            "mpi4py>=4.1",
            "openmpi>=5.0",
            # Routing traces are read with it in the documentation.
            "pandas>=2.2",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "scikit-learn>=1.6",
        ],
    },
)
